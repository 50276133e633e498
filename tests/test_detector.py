"""The whole model: training step, inference, errors, and its assembly from YAML."""

import itertools

import pytest
import torch
from atss import ATSS, ATSS_HEAD_REGISTRY, ATSSDetector, ATSSHead
from atss.anchors import GridAnchorGenerator, octave_sizes
from atss.assigners import ATSSAssigner, IoUAssigner, SimOTAAssigner
from atss.backbone import resnet_fpn
from atss.box_regression import Box2BoxTransform, PointToBoxTransform
from atss.targets import centerness_targets, label_anchors
from atss.training import load_yaml_config
from conftest import (
    REPO,
    STRIDES,
    assert_every_parameter_learns,
    boxes_of,
    labels_of,
    make_input,
    make_instances,
    tiny_detector,
)

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

BOXES = [[8.0, 8, 40, 48], [50, 10, 90, 40]]


@pytest.mark.parametrize("batch", ["objects", "one image empty", "all images empty"])
def test_every_trainable_parameter_gets_a_finite_gradient_from_every_batch(batch):
    model = tiny_detector()
    full, empty = make_input(boxes=BOXES, classes=[0, 2]), make_input()
    inputs = {
        "objects": [full, full], "one image empty": [full, empty], "all images empty": [empty] * 2
    }[batch]  # fmt: skip
    losses = model(inputs)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_centerness"}
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert_every_parameter_learns(model)


@pytest.mark.parametrize(
    "norm, box_loss, center_in_gt, with_centerness, level_scales",
    itertools.product(["GN", ""], ["giou", "smooth_l1"], *[[True, False]] * 3),
)
def test_improvements_are_independent_switches(
    norm, box_loss, center_in_gt, with_centerness, level_scales
):
    model = tiny_detector(
        head=dict(norm=norm, centerness=with_centerness, level_scales=level_scales),
        loss=dict(box_loss=box_loss),
        assigner=IoUAssigner(center_in_gt=center_in_gt),
    )
    losses = model([make_input(boxes=BOXES, classes=[0, 2]), make_input()])
    assert ("loss_centerness" in losses) == with_centerness
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert_every_parameter_learns(model)


def test_losses_of_a_batch_are_those_of_its_images_summed_by_hand():
    model = tiny_detector()
    batch = [make_input(boxes=BOXES, classes=[0, 2]), make_input(boxes=BOXES[:1], classes=[1])]
    together = model(batch)
    alone = [model([inputs]) for inputs in batch]
    core = model.proposal_generator
    positives, centers = [], []
    for inputs in batch:
        images = model.preprocess_image([inputs])
        features = [model.backbone(images.tensor)[name] for name in core.in_features]
        anchors = core.anchor_generator.grid(features)
        targets = label_anchors(core.assigner, anchors, [inputs["instances"]], 3)
        positive = labels_of(targets, 3)[0] < 3
        all_anchors = torch.cat([b.tensor for b in anchors.boxes])
        positives.append(float(positive.sum()))
        gt_boxes = boxes_of(targets)[0][positive]
        centers.append(float(centerness_targets(all_anchors[positive], gt_boxes).sum()))
    for name, weights in (
        ("loss_cls", positives), ("loss_centerness", positives), ("loss_box_reg", centers)
    ):  # fmt: skip
        expected = sum(w * losses[name].item() for w, losses in zip(weights, alone)) / sum(weights)
        assert together[name].item() == pytest.approx(expected, rel=1e-4), name


def test_detections_come_in_the_size_that_was_asked_for():
    model = tiny_detector().eval()
    torch.nn.init.normal_(model.proposal_generator.head.cls_logits.weight, std=0.5)
    inputs = make_input(64, 96)
    with torch.no_grad():
        plain = model([inputs])[0]["instances"]
        doubled = model([{**inputs, "height": 128, "width": 192}])[0]["instances"]
    assert doubled.image_size == (128, 192)
    torch.testing.assert_close(doubled.pred_boxes.tensor, 2 * plain.pred_boxes.tensor)


def test_two_images_overfit_in_25_steps():
    model = tiny_detector()
    batch = [make_input(boxes=BOXES, classes=[0, 2]), make_input(boxes=BOXES[1:], classes=[1])]
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    totals = []
    for _ in range(25):
        total = sum(model(batch).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-5:]) < 0.5 * sum(totals[:5])


@pytest.mark.parametrize("assigner", [ATSSAssigner(), SimOTAAssigner()], ids=["atss", "simota"])
@pytest.mark.parametrize("transform", [Box2BoxTransform(), PointToBoxTransform()])
def test_box_offset_moves_the_truth_of_training_as_far_as_the_boxes_of_evaluation(
    transform, assigner
):
    bias = 4.0 if isinstance(transform, PointToBoxTransform) else 0.0
    model = tiny_detector(box2box_transform=transform, head=dict(bbox_bias=bias), assigner=assigner)
    torch.nn.init.normal_(model.proposal_generator.head.bbox_pred.weight, std=0.05)
    inputs, classes = make_input(), [0, 2]
    expected = model([{**inputs, "instances": make_instances(BOXES, classes)}])
    model.proposal_generator.box_offset = 0.5
    found = model([{**inputs, "instances": make_instances(torch.tensor(BOXES) + 0.5, classes)}])
    assert expected["loss_box_reg"] > 0
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}


def test_training_under_bfloat16_autocast_stays_near_float32():
    model = tiny_detector()
    batch = [make_input(boxes=BOXES, classes=[0, 2])]
    full = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch)
    for name, value in full.items():
        torch.testing.assert_close(half[name], value, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    "boxes, classes, words",
    [
        ([[8.0, 8, float("nan"), 40]], [0], r"box 0 of image 7 is \[8.0, 8.0, nan, 40.0\]"),
        ([[8.0, 8, 40, 40], [40, 8, 8, 40]], [0, 0], "box 1 of image 7.*x1 <= x2"),
        ([[8.0, 8, 40, float("inf")]], [0], "finite"),
        ([[8.0, 8, 1e30, 1e30]], [0], "within 1000000 px"),
        ([[8.0, 8, 40, 40]], [3], r"Object 0 of image 7 has class 3, .* 3 classes \(0 to 2\)"),
        ([[8.0, 8, 40, 40]], [-1], "class -1"),
    ],
)
def test_broken_ground_truth_is_named(boxes, classes, words):
    inputs = {**make_input(boxes=boxes, classes=classes), "image_id": 7}
    with pytest.raises(ValueError, match=words):
        tiny_detector()([inputs])


@pytest.mark.parametrize(
    "assigner", [ATSSAssigner(center_in_gt=False), ATSSAssigner(min_positives_per_gt=2)]
)
def test_smooth_l1_of_truth_without_area_is_finite(assigner):
    model = tiny_detector(
        assigner=assigner, loss=dict(box_loss="smooth_l1"), head=dict(centerness=False)
    )
    losses = model([make_input(boxes=[[8.0, 8, 40, 8], [50, 10, 50, 40]], classes=[0, 2])])
    assert losses["loss_box_reg"].isfinite() and losses["loss_box_reg"] > 0
    sum(losses.values()).backward()
    assert_every_parameter_learns(model)


@pytest.mark.parametrize("assigner", [ATSSAssigner(), SimOTAAssigner()], ids=["atss", "simota"])
def test_classes_of_any_integer_type_mean_the_same(assigner):
    model, inputs = tiny_detector(assigner=assigner), make_input(boxes=BOXES, classes=[0, 2])
    expected = model([inputs])
    for dtype in (torch.int32, torch.uint8):
        inputs["instances"].gt_classes = inputs["instances"].gt_classes.to(dtype)
        assert model([inputs]) == expected


@pytest.mark.parametrize("shape", [(1, 64, 96), (4, 64, 96), (64, 96)])
def test_images_of_another_number_of_channels_are_refused(shape):
    inputs = {**make_input(), "image": torch.rand(shape), "image_id": 7}
    model = tiny_detector()
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"Image 7 .*shape \(.*64, 96\), .* \(3, height.*BGR"):
            model.train(mode)([inputs])


P2_TO_P6 = dict(
    in_features=["p2", "p3", "p4", "p5", "p6"],
    anchor_generator=GridAnchorGenerator(
        sizes=octave_sizes((4, 8, 16, 32, 64)), aspect_ratios=[1.0], strides=[4, 8, 16, 32, 64]
    ),
)


@pytest.mark.parametrize("num_top_levels", [1, 2])
def test_pyramid_from_p2_to_p6_trains_all_its_weights_or_is_refused(num_top_levels):
    backbone = resnet_fpn(
        18, "GN", 0, stem_out_channels=32, res2_out_channels=32, out_channels=64,
        in_features=["res2", "res3", "res4", "res5"], num_top_levels=num_top_levels,
    )  # fmt: skip
    if num_top_levels == 2:
        with pytest.raises(ValueError, match=r"leaves out \['p7'\].*num_top_levels"):
            tiny_detector(backbone=backbone, **P2_TO_P6)
        return
    model = tiny_detector(backbone=backbone, **P2_TO_P6)
    sum(model([make_input(boxes=BOXES, classes=[0, 2])]).values()).backward()
    assert_every_parameter_learns(model)


def test_yaml_makes_the_levels_that_its_detector_looks_at():
    cfg = tiny_yaml()
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ATSS.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RESNETS.NORM = "GN"
    model = build_model(cfg)
    sum(model([make_input(boxes=BOXES, classes=[0, 2])]).values()).backward()
    assert_every_parameter_learns(model)


def test_training_without_ground_truth_is_named():
    inputs = make_input()
    del inputs["instances"]
    with pytest.raises(ValueError, match="has no 'instances'"):
        tiny_detector()([inputs])


def test_strides_that_do_not_fit_the_features_are_named():
    wrong = GridAnchorGenerator(
        sizes=octave_sizes(STRIDES), aspect_ratios=[1.0], strides=[8, 16, 32, 64, 64]
    )
    with pytest.raises(ValueError, match="Feature p7 is 1x2 for an input .* stride 64"):
        tiny_detector(anchor_generator=wrong)([make_input(128, 160, BOXES, [0, 1])])


NINE_ANCHORS = GridAnchorGenerator(
    sizes=octave_sizes(STRIDES, 4, 3), aspect_ratios=[0.5, 1.0, 2.0], strides=list(STRIDES)
)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"head": dict(num_anchors=2)}, "head.num_anchors is 2, but needs 1"),
        ({"head": dict(num_classes=4)}, "head.num_classes is 4, but needs 3"),
        ({"head": dict(num_levels=4)}, "head.num_levels is 4, but needs 5"),
        ({"loss": dict(quality=None)}, "predicts centerness, but model.loss.quality is None"),
        ({"pixel_std": [1.0]}, "3 channels, pixel_std 1"),
        (
            {"box2box_transform": PointToBoxTransform(), "anchor_generator": NINE_ANCHORS,
             "head": dict(num_anchors=9)},
            "num_anchors=9.*anchor_generator one size and one ratio",
        ),
        (
            {"box2box_transform": PointToBoxTransform(5.0), "head": dict(bbox_bias=4.0)},
            "anchor_scale is 5.*8 strides large.*ANCHOR_SCALE",
        ),
        # Distances of points that would start without a gradient.
        ({"box2box_transform": PointToBoxTransform()}, "bbox_bias is 0.0.*HEAD.BBOX_BIAS. 4"),
        (
            {"box2box_transform": PointToBoxTransform(), "head": dict(bbox_bias=-1.0)},
            "bbox_bias is -1.0.*HEAD.BBOX_BIAS. 4",
        ),
        (
            {"loss": dict(box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)))},
            r"The loss has a .*'\$\{..box2box_transform",
        ),
        (
            {"loss": dict(box2box_transform=PointToBoxTransform())},
            r"The loss has a .*'\$\{..box2box_transform",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_each_other_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_detector(**changes)


def test_loss_with_an_equal_transform_is_taken():
    tiny_detector(loss=dict(box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0))))


def test_anchor_generator_without_a_lattice_is_refused():
    cfg = tiny_yaml()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "DefaultAnchorGenerator"
    with pytest.raises(ValueError, match="got a DefaultAnchorGenerator.*ANCHOR_GENERATOR.NAME"):
        build_model(cfg)


def test_a_head_of_your_own_needs_no_other_key_than_its_name(monkeypatch):
    class Bare(ATSSHead):
        def __init__(self, in_channels, num_classes, num_anchors):
            super().__init__(in_channels, num_classes, num_anchors)

    monkeypatch.setattr(ATSS_HEAD_REGISTRY, "_obj_map", dict(ATSS_HEAD_REGISTRY._obj_map))
    ATSS_HEAD_REGISTRY.register(Bare)
    cfg = load_yaml_config(str(REPO / "configs/Base-ATSS.yaml"), ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.ATSS.HEAD.NAME = "Bare"
    assert type(build_model(cfg).proposal_generator.head) is Bare


def test_statistics_are_logged_when_asked_for():
    model = tiny_detector(stats_period=1)
    with EventStorage(0) as storage:
        model([make_input(boxes=[*BOXES, [10, 10, 11, 11]], classes=[0, 2, 1])])
        latest = storage.latest()
    assert latest["atss/positives_per_image"][0] > 0
    assert latest["atss/objects_without_positives"][0] == 1


def test_training_is_drawn_into_the_storage_and_changes_nothing_when_asked_for():
    statistics = []
    for vis_period in (0, 1):
        torch.manual_seed(0)
        model = tiny_detector(vis_period=vis_period, head=dict(norm="BN"))
        with EventStorage(0) as storage:
            model([make_input(256, 256, boxes=BOXES, classes=[0, 2])])
            assert len(storage._vis_data) == vis_period
        assert all(module.training for module in model.modules())
        statistics.append(dict(model.named_buffers()))
    without, drawn = statistics
    assert any("running_mean" in name for name in drawn)
    for name, values in drawn.items():
        assert torch.equal(values, without[name]), name


def tiny_yaml():
    return load_yaml_config(str(REPO / "configs/toy/atss_toy.yaml"), ["MODEL.DEVICE", "cpu"])


def test_yaml_builds_registered_parts_with_its_values():
    cfg = tiny_yaml()
    cfg.MODEL.ATSS.ASSIGNER.TOPK = 5
    cfg.MODEL.ATSS.BOX2BOX_TRANSFORM.NAME = "PointToBoxTransform"
    cfg.MODEL.ATSS.HEAD.CENTERNESS = False
    model = build_model(cfg)
    core = model.proposal_generator
    assert isinstance(model, ATSSDetector) and isinstance(core, ATSS)
    assert core.assigner.topk == 5
    assert isinstance(core.loss.box2box_transform, PointToBoxTransform)
    assert (core.head.bbox_pred.bias == 4).all()
    assert set(model([make_input(boxes=BOXES, classes=[0, 2])])) == {"loss_cls", "loss_box_reg"}


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("ASSIGNER.NAME", "MaxIoU", r"ASSIGNER.NAME 'MaxIoU'; known are \['ATSSAssigner'"),
        ("BOX2BOX_TRANSFORM.NAME", "Linear", "known are .*PointToBoxTransform"),
        ("HEAD.NAME", "Head", "known are .*ATSSHead"),
        ("HEAD.NORM", "XN", "norm to be one of .*got 'XN'"),
        ("LOSS.BOX_LOSS", "ciou", "smooth_l1.*got 'ciou'"),
        ("ASSIGNER.TOPK", 0, "topk >= 1, got 0"),
        ("ASSIGNER.THRESHOLDS", (0.4, 0.5), r"\['THRESHOLDS'\], which ATSSAssigner does not take"),
        ("IN_FEATURES", ["p2", "p3"], r"names \['p2'\], but the backbone gives"),
    ],
)
def test_yaml_values_that_mean_nothing_are_named(key, value, words):
    cfg = tiny_yaml()
    node = cfg.MODEL.ATSS
    *path, last = key.split(".")
    for name in path:
        node = node[name]
    node[last] = value
    with pytest.raises(ValueError, match=words):
        build_model(cfg)
