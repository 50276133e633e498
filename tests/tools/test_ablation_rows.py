"""Rows of the paper's tables: declared differences, methods, training and detection."""

import dataclasses
import functools
import json

import cv2
import numpy as np
import pytest
import torch
from _ablations import rows as rows_module
from _ablations.differences import describe_changes, differences, faults, flatten
from _ablations.rows import CONFIGS, find_rows, load, select_rows
from atss import model_zoo
from atss.assigners.ssc import FCOS_SIZE_RANGES
from atss.training import evaluate_lazy
from conftest import REPO, make_input
from test_configs import TWINS, authors_names, golden_recipe, group_summary

from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets import register_coco_instances

ROWS = find_rows()
RELEASE = [row for row in ROWS if row.table == "Release"]

# The paper's AP in the order of its tables, and the release's (minival; Table 8: test-dev).
PUBLISHED = {
    "Table 1": [32.5, 33.4, 34.9, 35.3, 36.8, 37.0, 37.8],
    "Table 2": [37.0, 36.9, 37.8, 37.8],
    "Table 3": [37.0, 39.3, 37.8, 38.6, 39.2],
    "Table 4": [38.0, 38.8, 39.1, 39.3, 39.1, 39.0, 39.1, 39.2, 38.9],
    "Table 5": [39.0, 39.2, 39.3, 39.3, 38.9],
    "Table 6": [39.1, 39.0, 39.3, 39.3, 39.1],
    "Table 7": [36.3, 38.4, 39.2, 39.3, 39.2, 39.3],
    "Table 8": [43.6, 45.1, 45.6, 46.3, 47.7, 47.7, 50.6, 50.7],
    "Release": [39.3, 41.5, 43.5, 44.8, 45.5, 43.2, None, 46.1, 47.7, 47.7],
}


def short(row):
    return row.name


def path_of(row):
    return CONFIGS / f"{row.name}.py"


shared_config = functools.cache(load)  # for tests that only look


def row_named(name):
    (row,) = select_rows(ROWS, [name])
    return row


def test_every_row_of_the_tables_is_there_with_the_published_ap():
    found = {table: [row.ap for row in ROWS if row.table == table] for table in PUBLISHED}
    assert found == PUBLISHED
    assert {row.split for row in ROWS if row.table == "Table 8"} == {"test-dev"}
    sources = {row.source for row in ROWS if row.table.startswith("Table")}
    assert sources == {"paper"}


@pytest.mark.parametrize("row", ROWS, ids=short)
def test_row_differs_from_its_parent_in_exactly_the_declared_way(row):
    assert faults(row, load(row.origin), load(row.name)) == []
    number = "" if row in RELEASE else f"{row.table}, row {row.number}: {row.title}."
    assert path_of(row).read_text().startswith(f'"""{number}')  # the docstring agrees with the data


# What the paper's tables say of each row, by the two zero points and what they change.
BASE = dict(
    assigner="IoUAssigner", thresholds=(0.4, 0.5), center_in_gt=False, norm="", centerness=False,
    level_scales=False, box_loss="smooth_l1", box_loss_weight=0.25, transform="Box2BoxTransform",
    bbox_bias=0.0, scale=8, scales_per_octave=1, aspect_ratios=(1.0,), num_anchors=1,
)  # fmt: skip
NORM = {**BASE, "norm": "GN"}
GIOU = {**NORM, "box_loss": "giou", "box_loss_weight": 2.0}
IN_GT = {**GIOU, "center_in_gt": True}
CENTERNESS = {**IN_GT, "centerness": True}
IMPROVED = {**CENTERNESS, "level_scales": True}
POINT = dict(transform="PointToBoxTransform", bbox_bias=4.0)
SSC = {k: v for k, v in IMPROVED.items() if k not in ("thresholds", "center_in_gt")}
SSC = {**SSC, "assigner": "SSCAssigner", "radius": None, "size_ranges": FCOS_SIZE_RANGES}
FULL = {k: v for k, v in IMPROVED.items() if k != "thresholds"}
FULL = {**FULL, "assigner": "ATSSAssigner", "topk": 9}
NINE = dict(scales_per_octave=3, aspect_ratios=(0.5, 1.0, 2.0), num_anchors=9)
METHODS = {
    "improvements/retinanet_a1": BASE,
    "improvements/group_norm": NORM,
    "improvements/giou": GIOU,
    "improvements/in_gt_box": IN_GT,
    "improvements/centerness": CENTERNESS,
    "improvements/level_scales": IMPROVED,
    "improvements/fcos": {**SSC, **POINT},
    "boxes_or_points/iou_box": IMPROVED,
    "boxes_or_points/iou_point": {**IMPROVED, **POINT},
    "boxes_or_points/ssc_box": SSC,
    "boxes_or_points/ssc_point": {**SSC, **POINT},
    "sample_selection/retinanet_a1": IMPROVED,
    "sample_selection/retinanet_a1_atss": FULL,
    "sample_selection/fcos": {**SSC, **POINT},
    "sample_selection/fcos_center_sampling": {**SSC, **POINT, "radius": 1.5},
    "sample_selection/fcos_atss": {**FULL, **POINT},
    **{f"topk/k{k}": {**FULL, "topk": k} for k in range(3, 20, 2)},
    **{f"anchor_scale/scale{s}": {**FULL, "scale": s} for s in range(5, 10)},
    **{
        f"anchor_ratio/ratio{height}to{width}": {**FULL, "aspect_ratios": (height / width,)}
        for height, width in ((1, 4), (1, 2), (1, 1), (2, 1), (4, 1))
    },
    "anchors_per_location/retinanet_a9": {**BASE, **NINE, "scale": 4},
    "anchors_per_location/retinanet_a9_improved": {**IMPROVED, **NINE, "scale": 4},
    "anchors_per_location/atss_3_scales_3_ratios": {**FULL, **NINE},
    "anchors_per_location/atss_3_scales": {
        **FULL, **NINE, "aspect_ratios": (1.0,), "num_anchors": 3
    },
    "anchors_per_location/atss_3_ratios": {
        **FULL, **NINE, "scales_per_octave": 1, "num_anchors": 3
    },
    "anchors_per_location/atss_1_scale_1_ratio": FULL,
}  # fmt: skip


def method_of(cfg):
    """The four axes of a config, under the names of `METHODS`."""
    flat = flatten(cfg, resolve=True)

    def kind(part):
        return flat[f"model.{part}._target_"].rsplit(".", 1)[1]

    places = {
        "assigner": ("thresholds", "center_in_gt", "topk", "size_ranges"),
        "head": ("norm", "centerness", "level_scales", "bbox_bias", "num_anchors"),
        "loss": ("box_loss", "box_loss_weight"),
        "anchor_generator.sizes": ("scale", "scales_per_octave"),
        "anchor_generator": ("aspect_ratios",),
    }
    found = {"assigner": kind("assigner"), "transform": kind("box2box_transform")}
    for part, names in places.items():
        found.update({n: flat[f"model.{part}.{n}"] for n in names if f"model.{part}.{n}" in flat})
    if "model.assigner.center_sampling_radius" in flat:
        found["radius"] = flat["model.assigner.center_sampling_radius"]
    return found


@pytest.mark.parametrize("name", METHODS)
def test_row_is_the_method_of_the_papers_table(name):
    cfg = shared_config(f"ablations/{name}")
    assert method_of(cfg) == METHODS[name]
    flat = flatten(cfg, resolve=True)
    # What holds in every row: who reads a value twice reads the same.
    for part in ("head", "loss"):
        assert flat[f"model.{part}.num_classes"] == flat["model.num_classes"]
    assert flat["model.loss.quality"] == "centerness"
    if METHODS[name]["transform"] == "PointToBoxTransform":
        scale = METHODS[name]["scale"]  # so that deltas are in units of the stride
        assert flat["model.box2box_transform.anchor_scale"] == scale
        assert flat["model.loss.box2box_transform.anchor_scale"] == scale


def test_every_row_but_the_models_of_table_8_has_its_method_checked():
    names = {row.name for row in ROWS if row.table.startswith("Table") and row.table != "Table 8"}
    assert names == {f"ablations/{name}" for name in METHODS}


def faults_of(name, origin=None, parent=None, **declaration):
    """Faults of a row with parts of its declaration or of its parent replaced."""
    row = row_named(name)
    if parent or "same_as" in declaration:
        declaration = {"parent": parent, "same_as": None, **declaration}
    row = dataclasses.replace(row, **declaration)
    return faults(row, origin or load(row.origin), load(row.name))


def test_parent_that_already_has_a_rows_value_is_a_fault():
    parent = load(row_named("topk/k3").origin)
    parent.model.assigner.topk = 3
    equal, declared = faults_of("topk/k3", parent)
    assert "equals ablations/topk/k9: declare it as same_as" in equal
    assert "declares 'model.assigner.topk: 9 -> 3', which is no difference" in declared


def test_difference_that_is_not_declared_is_a_fault():
    parent = load(row_named("topk/k3").origin)
    parent.model.selector.nms_thresh = 0.5
    (fault,) = faults_of("topk/k3", parent)
    assert "in 'model.selector.nms_thresh: 0.5 -> 0.6', which it does not declare" in fault
    (fault,) = faults_of("topk/k3", changes=())
    assert "in 'model.assigner.topk: 9 -> 3', which it does not declare" in fault


def test_wrong_parent_is_a_fault_even_if_it_differs_in_the_same_entry():
    found = faults_of("topk/k3", parent="ablations/topk/k5")
    assert "differs from ablations/topk/k5 in 'model.assigner.topk: 5 -> 3'" in found[0]
    assert "declares 'model.assigner.topk: 9 -> 3', which is no difference" in found[1]


def test_row_that_equals_its_parent_must_say_so_and_one_that_says_so_must_equal_it():
    (fault,) = faults_of("topk/k9", parent="coco/atss_R_50_FPN_1x")
    assert "equals coco/atss_R_50_FPN_1x: declare it as same_as" in fault
    (fault,) = faults_of("topk/k3", same_as="ablations/topk/k9", changes=())
    assert "differs from ablations/topk/k9 in 'model.assigner.topk: 9 -> 3'" in fault
    (fault,) = faults_of("improvements/retinanet_a1", same_as="common/models/atss")[:1]
    assert "differs from common/models/atss in 'model.assigner: ATSSAssigner -> IoU" in fault


def test_row_that_writes_into_the_folder_of_its_parent_is_a_fault():
    parent = load(row_named("topk/k3").origin)
    parent.train.output_dir = "output/ablations/topk/k3"
    (fault,) = faults_of("topk/k3", parent)
    assert "has the train.output_dir of ablations/topk/k9" in fault


def test_arguments_at_their_defaults_are_no_difference():
    cfg, spelled_out = load(row_named("ssc_box").name), load(row_named("ssc_box").name)
    spelled_out.model.assigner.center_sampling_radius = None
    assert differences(cfg, spelled_out) == {}
    spelled_out.model.assigner.center_sampling_radius = 1.5
    assert differences(cfg, spelled_out) == {
        "model.assigner.center_sampling_radius": "None -> 1.5"
    }  # fmt: skip


def test_differences_are_shown_in_words():
    def words(name):
        row = row_named(name)
        return describe_changes(row, load(row.origin), load(row.name))

    assert words("topk/k3") == "model.assigner.topk: 9 -> 3"
    assert words("ssc_box") == "model.assigner: IoUAssigner -> SSCAssigner"
    assert words("topk/k9") == "same as coco/atss_R_50_FPN_1x"
    assert words("improvements/retinanet_a1") == "same as common/models/retinanet_a1"


@pytest.mark.parametrize("name", ["retinanet_a1_atss", "atss_1_scale_1_ratio", "topk/k9"])
def test_paths_through_the_tables_end_at_the_same_full_method(name):
    found = flatten(shared_config(row_named(name).name), resolve=True)
    expected = flatten(shared_config("coco/atss_R_50_FPN_1x"), resolve=True)
    folders = dict.fromkeys(("train.output_dir", "dataloader.evaluator.output_dir"))
    assert {**found, **folders} == {**expected, **folders}


def test_every_row_has_an_output_folder_of_its_own():
    for row in ROWS:
        expected = "output/" + row.name.replace("coco/", "")
        assert shared_config(row.name).train.output_dir == expected


def test_point_rows_keep_the_stride_as_their_unit_at_every_anchor_scale():
    cfg = load(row_named("fcos_atss").name)
    cfg.model.anchor_generator.sizes.scale = 5
    transform = instantiate(cfg.model.box2box_transform)
    assert transform.anchor_scale == 5
    assert instantiate(cfg.model.loss).box2box_transform.anchor_scale == 5


def test_multi_scale_rows_take_the_releases_views():
    for name in ("dcnv2_X_101_32x8d_multi_scale", "dcnv2_X_101_64x4d_multi_scale"):
        tta = shared_config(row_named(name).name).train.tta
        assert tta.enabled and tta.min_sizes is None and tta.base_size == 800
        assert tta.merge == "soft-vote" and tta.flip


def test_test_dev_rows_leave_detections_for_the_server_where_there_is_no_ground_truth(tmp_path):
    image = {"id": 1, "file_name": "1.png", "height": 64, "width": 64}
    categories = [{"id": i + 1, "name": str(i)} for i in range(3)]
    (tmp_path / "info.json").write_text(json.dumps({"images": [image], "categories": categories}))
    cv2.imwrite(str(tmp_path / "1.png"), np.full((64, 64, 3), 127, np.uint8))
    name = f"unlabelled_{tmp_path.name}"
    register_coco_instances(name, {}, str(tmp_path / "info.json"), str(tmp_path))
    cfg = load(row_named("sota/R_101").name)
    assert list(cfg.dataloader.test.dataset.names) == ["coco_2017_test-dev"]
    cfg.dataloader.test.dataset.names = [name]
    cfg.dataloader.test.num_workers = 0
    cfg.dataloader.test.mapper.augmentations[0].short_edge_length = 64
    cfg.train.output_dir = str(tmp_path / "run")
    tiny(cfg)
    cfg.model.selector.score_thresh = 0.0
    assert not evaluate_lazy(cfg, instantiate(cfg.model).eval())
    found = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    assert len(found) > 0 and {entry["image_id"] for entry in found} == {1}


def test_all_models_of_the_release_have_yaml_twins():
    assert len(RELEASE) == 10
    assert {row.name for row in RELEASE} <= set(TWINS)


def test_2x_recipe_is_twice_as_long_on_every_integer_short_edge():
    for row in RELEASE:
        cfg = shared_config(row.name)
        if not row.name.endswith("2x"):
            continue
        scheduler = cfg.lr_multiplier.scheduler
        assert (cfg.train.max_iter, scheduler.num_updates) == (180000, 180000)
        assert list(scheduler.milestones) == [120000, 160000]
        resize = instantiate(cfg.dataloader.train.mapper.augmentations[0])
        image = torch.zeros(900, 1000, 3).numpy()
        found = {resize.get_transform(image).new_h for _ in range(3000)}
        assert found == set(range(640, 801))


def test_deformable_stages_are_those_of_the_paper():
    for row in RELEASE:
        model = shared_config(row.name).model
        stages = [False] * 4
        if "dcnv2" in row.name:
            stages = [False, "X_101" not in row.name, True, True]
        assert list(model.backbone.get("deform_on_per_stage", [False] * 4)) == stages
        assert model.head.get("deformable", False) == ("dcnv2" in row.name)


@pytest.mark.parametrize("row", RELEASE, ids=short)
def test_rate_and_decay_follow_the_releases_rule_in_every_model(row):
    _, golden = golden_recipe()
    frozen = {".".join(n.split(".")[:3]) for n, values in golden.items() if values is None}
    assert frozen == {"backbone.body.stem", "backbone.body.layer1"}
    values = {n.rpartition(".")[2]: v for n, v in golden.items() if v is not None}
    assert values == {"weight": (0.01, 1e-4), "bias": (0.02, 0.0), "scale": (0.01, 1e-4)}
    for name, expected in golden.items():  # the rule says all of the recorded model
        is_frozen = name.startswith(tuple(frozen))
        assert expected == (None if is_frozen else values[name.rpartition(".")[2]]), name

    cfg = load(row.name)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    groups = group_summary(instantiate(cfg.optimizer), model)
    for name, _ in model.named_parameters():
        is_frozen = authors_names(name).startswith(tuple(frozen))
        expected = None if is_frozen else pytest.approx(values[name.rpartition(".")[2]])
        assert groups.get(name) == expected, name


def tiny(cfg):
    """The row's model, thin and shallow, with its own method, groups and deformable stages."""
    backbone = cfg.model.backbone
    needs_bottlenecks = backbone.get("num_groups", 1) > 1 or "deform_on_per_stage" in backbone
    backbone.depth = 50 if needs_bottlenecks else 18
    backbone.width_per_group = 1 if backbone.get("num_groups", 1) > 1 else 8
    backbone.norm, backbone.freeze_at = "BN", 0
    backbone.stem_out_channels = backbone.res2_out_channels = 32
    backbone.out_channels = 64  # two channels a group: P7 is a single location here
    cfg.model.head.num_convs = 1
    cfg.model.num_classes = 3
    return cfg.model


_TRIED = set()


@pytest.mark.parametrize("row", ROWS, ids=short)
def test_row_takes_a_training_step_and_detects(row):
    cfg = load(row.name)
    tiny(cfg)
    # Rows that differ in data, schedule or depth alone are one model here.
    kind = str(sorted((k, str(v)) for k, v in flatten(cfg, resolve=True).items() if "model." in k))
    if kind in _TRIED:
        return
    _TRIED.add(kind)
    model = instantiate(cfg.model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    boxes, classes = [[8.0, 8, 40, 48], [20, 10, 60, 40]], [0, 2]
    losses = model([make_input(64, 64, boxes, classes), make_input(64, 64)])
    expected = {"loss_cls", "loss_box_reg"} | (
        {"loss_centerness"} if cfg.model.head.centerness else set()
    )
    assert set(losses) == expected
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()([make_input(64, 64)])
    assert found["instances"].has("pred_boxes")
    assert found["instances"].pred_boxes.tensor.isfinite().all()


def test_zoo_knows_the_rows():
    assert {row.name for row in ROWS} <= set(model_zoo.list_configs())
    assert model_zoo.get_config("topk/k3").model.assigner.topk == 3


def test_model_zoo_page_has_the_published_figures_and_says_whose_they_are():
    lines = (REPO / "MODEL_ZOO.md").read_text().splitlines()
    for row in ROWS:
        if row.table not in ("Release", "Table 8"):
            continue
        (line,) = [line for line in lines if f"](configs/{row.name}.py)" in line]
        assert row.ap is None or f" {row.ap}" in line, row.name
        assert row.source != "mmdetection" or "mmdetection's" in line


@pytest.mark.parametrize(
    "text, words",
    [
        ("model = dict()", "strange.py has no `row = dict"),
        ("row = dict(table='Table 4', number=1)", "missing 4 required .*'title', 'ap'"),
        ("row = dict(table='Table 4', number=1, title='k = 3', ap=38.0, source='paper', "
         "split='minival')", "strange.py cannot be read: it needs either a parent or same_as"),
        ("row = dict(tables='Table 4')", "unexpected keyword argument 'tables'"),
    ],
)  # fmt: skip
def test_file_without_a_complete_row_is_named(text, words, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "CONFIGS", tmp_path)
    (tmp_path / "ablations").mkdir()
    (tmp_path / "ablations" / "strange.py").write_text(text)
    with pytest.raises(ValueError, match=words):
        find_rows()


def test_row_is_saved_with_the_config_of_a_run(tmp_path):
    LazyConfig.save(
        LazyConfig.load(str(path_of(row_named("topk/k3")))), str(tmp_path / "config.yaml")
    )
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert saved.row.title == "k = 3" and saved.row.changes == ["model.assigner.topk: 9 -> 3"]
    assert instantiate(saved.model.assigner).topk == 3
