"""Weights of other code bases: names, shapes, geometry, files that cannot be trusted."""

import logging
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from atss.backbone import resnet_fpn
from atss.checkpoint import (
    CheckpointError,
    check_pickle,
    convert_checkpoint,
    detect_source,
    fetch,
    num_classes_of,
    override_config,
    override_model,
    read_checkpoint,
    rehead,
    write_checkpoint,
)
from atss.config import add_atss_config
from atss.head import ATSSHead
from atss.model_zoo import get_config
from atss.stored_settings import STATE_KEY, settings_of
from author_keys import RELEASES, author_shapes, mmdet_shapes
from conftest import GOLDEN, golden_cases, tiny_detector

from detectron2.config import get_cfg

AUTHOR = author_shapes(RELEASES["R_50_FPN_1x"])
AUTHOR_DCN = author_shapes(RELEASES["dcnv2_R_50_FPN_1x"])
MMDET = mmdet_shapes()


def meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def filled(shapes):
    """Every value different, so that a permutation or a swap shows."""
    return {
        name: torch.full(shape, float(i)) + torch.rand(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def our_shapes(release):
    with torch.device("meta"):
        parts = {
            "backbone.": resnet_fpn(
                release.depth,
                num_groups=release.num_groups,
                width_per_group=release.width_per_group,
                deform_on_per_stage=release.deform_on_per_stage,
            ),
            "proposal_generator.head.": ATSSHead(256, 80, deformable=release.deformable),
        }
    weights = {p + n: v for p, part in parts.items() for n, v in part.state_dict().items()}
    return shapes_of({n: v for n, v in weights.items() if not n.endswith(STATE_KEY)})


def shapes_of(weights):
    return {name: tuple(value.shape) for name, value in weights.items()}


@pytest.mark.parametrize("name", ["R_50_FPN_1x", "dcnv2_R_50_FPN_1x"])
def test_shapes_of_the_authors_weights_are_the_recorded_ones(name):
    lines = (GOLDEN / "keys" / f"atss_{name}.txt").read_text().splitlines()
    recorded = dict(map(str.split, lines))
    found = author_shapes(RELEASES[name])
    assert {key: "x".join(map(str, shape)) for key, shape in found.items()} == recorded


@pytest.mark.parametrize("name", RELEASES)
def test_every_parameter_of_every_release_config_is_filled(name):
    shapes = author_shapes(RELEASES[name])

    converted = convert_checkpoint(meta(shapes))

    assert shapes_of(converted.state_dict) == our_shapes(RELEASES[name])
    assert len(converted.state_dict) + len(converted.dropped) == len(shapes)
    assert all("cell_anchors" in key for key in converted.dropped)
    is_resnext = name.startswith(("X", "dcnv2_X"))
    assert converted.overrides["model.backbone.stride_in_1x1"] is not is_resnext


@pytest.mark.parametrize("depth", [50, 101])
def test_every_parameter_is_filled_from_mmdetection(depth):
    converted = convert_checkpoint(meta(mmdet_shapes(depth)))
    assert shapes_of(converted.state_dict) == our_shapes(RELEASES[f"R_{depth}_FPN_1x"])
    assert all(key.endswith("num_batches_tracked") for key in converted.dropped)


@pytest.mark.parametrize(
    "source, shapes", [("author", AUTHOR), ("author", AUTHOR_DCN), ("mmdet", MMDET)]
)
def test_there_and_back_is_the_identity_on_mapped_names(source, shapes):
    weights = filled(shapes)

    converted = convert_checkpoint(weights, source)
    assert shapes_of(weights) == shapes  # the input stays as it is
    back = convert_checkpoint(converted.state_dict, target=source)

    assert set(back.state_dict) == set(weights) - set(converted.dropped)
    for name, value in back.state_dict.items():
        assert value.shape == weights[name].shape and torch.equal(value, weights[name]), name


def test_weights_are_recognised_bare_and_wrapped():
    parallel = {f"module.{name}": value for name, value in meta(AUTHOR).items()}
    assert detect_source({"model": parallel, "iteration": 7}) == "author"
    assert detect_source({"meta": {"epoch": 12}, "state_dict": meta(MMDET)}) == "mmdet"
    assert detect_source(tiny_detector().state_dict()) == "atss"
    assert detect_source({"fc1.weight": torch.zeros(1)}) is None
    converted = convert_checkpoint({"model": parallel})
    assert "backbone.bottom_up.stem.conv1.weight" in converted.state_dict


def test_geometry_travels_with_the_names():
    author, mmdet = (convert_checkpoint(meta(shapes)).overrides for shapes in (AUTHOR, MMDET))
    assert author["model.box_offset"] == 0.5 and mmdet["model.box_offset"] == 0.0
    assert author["model.anchor_generator.offset"] == 0.5
    assert mmdet["model.anchor_generator.offset"] == 0.0
    assert author["model.backbone.relu_before_p7"] and not mmdet["model.backbone.relu_before_p7"]
    assert author["model.backbone.frozen_bn_eps"] == 0.0
    assert mmdet["model.backbone.stride_in_1x1"] is False
    assert mmdet["model.selector.sqrt_score"] is False
    assert (author["model.input_format"], mmdet["model.input_format"]) == ("BGR", "RGB")


def test_overrides_reach_both_kinds_of_config():
    overrides = convert_checkpoint(meta(MMDET)).overrides
    lazy = override_config(get_config("atss_R_50_FPN_1x"), overrides)
    assert lazy.model.anchor_generator.offset == 0.0
    assert lazy.model.backbone.relu_before_p7 is False
    cfg = get_cfg()
    add_atss_config(cfg)
    override_config(cfg, overrides)
    assert cfg.MODEL.ANCHOR_GENERATOR.OFFSET == 0.0
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.INPUT.FORMAT == "RGB"
    assert list(cfg.MODEL.PIXEL_MEAN) == overrides["model.pixel_mean"]


def test_a_bare_resnet_fills_the_bottom_up_part():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        weights = torchvision.models.resnet50().state_dict()
    converted = convert_checkpoint(weights)
    ours = our_shapes(RELEASES["R_50_FPN_1x"]).items()
    needed = {name: shape for name, shape in ours if "bottom_up" in name}
    assert shapes_of(converted.state_dict) == needed
    assert {"fc.weight", "fc.bias"} <= set(converted.dropped)
    assert "model.box_offset" not in converted.overrides


@pytest.mark.parametrize("case, fields", golden_cases("head"), ids=lambda v: v.get("name", ""))
def test_converted_head_gives_the_outputs_of_the_authors(case, fields):
    weights = {
        key.replace("param:", "rpn.head."): value
        for key, value in fields.items()
        if key.startswith("param:")
    }
    converted = convert_checkpoint(weights).state_dict
    head = ATSSHead(case["in_channels"], case["num_classes"], num_convs=case["num_convs"])
    head.load_state_dict({key.split(".head.")[1]: value for key, value in converted.items()})
    with torch.no_grad():
        found = head([fields[f"feat{i}"] for i in range(5)])
    for maps, name in ((found.logits, "cls"), (found.quality, "ctr")):
        for i, level in enumerate(maps):
            expected = fields[f"{name}{i}"]
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)


def test_another_architecture_is_refused_with_a_name():
    weights = meta(MMDET)
    weights["bbox_head.atss_iou.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="atss_iou"):
        convert_checkpoint(weights)
    with pytest.raises(CheckpointError, match="fc1.weight"):
        convert_checkpoint({"fc1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="needs tensors"):
        convert_checkpoint({"rpn.head.cls_logits.bias": "text"})


def test_tower_biases_that_mmdetection_cannot_hold_are_refused():
    weights = tiny_detector().state_dict()
    weights["proposal_generator.head.cls_tower.0.bias"] += 1
    with pytest.raises(CheckpointError, match="conv_bias=False"):
        convert_checkpoint(weights, target="mmdet")


def test_rehead_renews_the_class_predictor_alone():
    weights = tiny_detector(num_classes=3).state_dict()
    renewed, names = rehead(weights, 7)
    assert num_classes_of(weights) == 3 and num_classes_of(renewed) == 7
    assert [name.rsplit(".", 2)[-2] for name in names] == ["cls_logits"] * 2
    assert all(renewed[name] is weights[name] for name in weights if name not in names)
    tiny_detector(num_classes=7).load_state_dict(renewed)
    again, _ = rehead(weights, 7)
    assert torch.equal(again[names[0]], renewed[names[0]])
    assert rehead(weights, 3)[1] == []


def test_turned_channels_compute_the_same():
    rgb = tiny_detector(input_format="RGB", pixel_mean=[1.0, 2.0, 3.0]).eval()
    bgr = tiny_detector(input_format="BGR").eval()
    weights = dict(rgb.state_dict())
    overrides = {
        "model.input_format": "RGB",
        "model.pixel_mean": [1.0, 2.0, 3.0],
        "model.pixel_std": [60.0] * 3,
    }
    bgr.load_state_dict(override_model(bgr, overrides, weights))
    image = torch.rand(3, 64, 64) * 255
    with torch.no_grad():
        expected = rgb.backbone(rgb.preprocess_image([{"image": image}]).tensor)["p3"]
        found = bgr.backbone(bgr.preprocess_image([{"image": image.flip(0)}]).tensor)["p3"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert settings_of(bgr)["model.pixel_mean"] == [3.0, 2.0, 1.0]
    assert bgr.input_format == "BGR"


def test_overrides_change_what_the_model_computes_with(caplog):
    model = tiny_detector(
        backbone=resnet_fpn(50, stem_out_channels=32, res2_out_channels=32, out_channels=64)
    )
    overrides = convert_checkpoint(meta(MMDET)).overrides
    with caplog.at_level(logging.INFO, logger="atss"):
        override_model(model, overrides, {})
    core, backbone = model.proposal_generator, model.backbone
    assert core.anchor_generator.offset == 0.0 and core.selector.sqrt_score is False
    assert backbone.top_block.relu_before_p7 is False
    block = backbone.bottom_up.res3[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    assert "relu_before_p7: True -> False" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="atss"):
        override_model(model, overrides, {})
    assert [r for r in caplog.messages if "first convolution" not in r] == []


def test_a_model_without_place_for_the_geometry_is_a_conflict():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="model.box_offset=0.5"):
        override_model(model, {"model.box_offset": 0.5}, {})


class Evil:
    def __reduce__(self):
        return os.system, ("echo this must not run > ran.txt",)


def test_files_that_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "meta": Evil()}, "evil.pth")
    with pytest.raises(CheckpointError, match="refused.*system") as refused:
        read_checkpoint("evil.pth")
    assert "weights_only" not in str(refused.value) and "\x1b" not in str(refused.value)
    with open("evil.pkl", "wb") as file:
        pickle.dump({"model": Evil()}, file)
    with pytest.raises(CheckpointError, match="system"):
        check_pickle("evil.pkl")
    assert not os.path.exists("ran.txt")


def test_logs_of_mmengine_are_left_out_and_nothing_is_imported(tmp_path, monkeypatch):
    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.arange(3.0)
            self._statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self):
            return 0.0

    class ConfigDict(dict):
        pass

    history = types.ModuleType("mmengine.logging.history_buffer")
    for name, kind in (("HistoryBuffer", HistoryBuffer), ("ConfigDict", ConfigDict)):
        kind.__module__, kind.__qualname__ = history.__name__, name
        setattr(history, name, kind)
    HistoryBuffer.mean.__module__ = history.__name__
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    for name in ("mmengine", "mmengine.logging", history.__name__):
        monkeypatch.setitem(sys.modules, name, history)
    weights = {"bbox_head.atss_cls.weight": torch.arange(4.0)}
    content = {
        "meta": {"epoch": 12, "cfg": ConfigDict(a=1)},
        "state_dict": weights,
        "message_hub": {"log_scalars": {"loss": HistoryBuffer()}, "last": np.float64(2.0)},
    }
    torch.save(content, tmp_path / "epoch_12.pth")
    torch.save({**content, "hook": Evil()}, tmp_path / "evil.pth")
    for name in ("mmengine", "mmengine.logging", history.__name__):
        monkeypatch.delitem(sys.modules, name)

    found = read_checkpoint(str(tmp_path / "epoch_12.pth"))
    assert found["meta"]["epoch"] == 12
    assert torch.equal(found["state_dict"]["bbox_head.atss_cls.weight"], torch.arange(4.0))
    assert "mmengine" not in sys.modules
    with pytest.raises(CheckpointError, match="would import .*system"):
        read_checkpoint(str(tmp_path / "evil.pth"))


def test_pickles_of_arrays_pass(tmp_path):
    path = tmp_path / "zoo.pkl"
    content = {"model": {"a": np.zeros((2, 3), np.float32), "b": np.float32(1)}, "__author__": "x"}
    path.write_bytes(pickle.dumps(content))
    check_pickle(str(path))


def test_truncated_and_other_files_are_refused(tmp_path):
    path = tmp_path / "half.pth"
    torch.save({"model": {"a": torch.rand(1000)}}, path)
    whole = path.read_bytes()
    for content in (b"", whole[:10], whole[:500], whole[:-30], b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="truncated, corrupt"):
            read_checkpoint(str(path))
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        read_checkpoint(str(tmp_path / "missing.pth"))
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        read_checkpoint(str(path))


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "out.pth"
    write_checkpoint({"a": torch.ones(2)}, str(path))
    with pytest.raises(Exception):  # noqa: B017  whatever pickle raises
        write_checkpoint({"a": lambda: None}, str(path))
    assert os.listdir(tmp_path) == ["out.pth"]
    assert read_checkpoint(str(path))["a"].tolist() == [1, 1]


def test_an_address_that_does_not_answer_is_said_in_one_sentence():
    with pytest.raises(CheckpointError, match="Check the network"):
        fetch("http://127.0.0.1:9/a.pth")  # nobody listens there
