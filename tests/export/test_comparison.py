"""The comparison of a file with its model notices what is wrong, and only that."""

import functools

import pytest
import torch
from atss.export import (
    class_names_of,
    collect_metadata,
    compare_with_eager,
    format_table,
    resize_rule,
    sizes_to_compare,
    spread_scores,
)
from atss.export.comparison import ComparisonRow
from atss.export.matching import Difference, Suppression, match_detections
from atss.export.modules import ExportableDetector, detect_as_tensors
from atss.model_zoo import get_config
from atss.training import load_yaml_config
from conftest import REPO, tiny_detector


def detections(count=5):
    """Boxes of 20 px that do not overlap, 30 px apart, with scores 0.9 to 0.1 and three classes."""
    left = torch.arange(count) * 30.0
    boxes = torch.stack((left, left, left + 20, left + 20), dim=1)
    return [boxes, torch.linspace(0.9, 0.1, count), torch.arange(count) % 3]


def with_row(tensors, row, **changes):
    """The detections with other values in one row."""
    tensors = [tensor.clone() for tensor in tensors]
    for name, value in changes.items():
        tensors[("boxes", "scores", "classes").index(name)][row] = value
    return tensors


def joined(tensors, others):
    return [torch.cat(parts) for parts in zip(tensors, others)]


def test_equal_detections_match_in_any_order():
    order = torch.tensor([1, 0, 2, 4, 3])
    match = match_detections(detections(), [x[order] for x in detections()])
    assert match == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "change",
    [
        dict(boxes=torch.tensor([60.02, 60, 80, 80])),
        dict(scores=0.5 + 2e-4),
        dict(classes=0),
    ],
)
def test_box_score_or_class_that_differs_has_no_partner(change):
    found = with_row(detections(), 2, **change)
    assert match_detections(detections(), found).num_unmatched == 2  # one of each list
    suppression = Suppression(detections(), 0.6, 100)
    assert match_detections(detections(), found, suppression).num_unmatched == 2


def test_detection_that_lacks_or_repeats_has_no_partner():
    expected = detections()
    none = [x[:0] for x in expected]
    assert match_detections(expected, [x[:-1] for x in expected]).num_unmatched == 1
    assert match_detections(expected, joined(expected, [x[-1:] for x in expected]))[3] == 1
    assert match_detections(expected, none).num_unmatched == 5
    assert match_detections(none, expected).num_unmatched == 5
    assert match_detections(none, none) == (0, 0, 0, 0)


def test_of_two_equal_boxes_either_may_suppress_the_other():
    # 18 of 22 px shared: IoU 0.82.
    expected = detections()
    found = with_row(expected, 2, boxes=torch.tensor([62.0, 60, 82, 80]), scores=0.5 - 1e-6)
    suppression = Suppression(joined(expected, [x[2:3] for x in found]), 0.6, 100)

    assert match_detections(expected, found, suppression)[2:] == (1, 0)
    # If the model never had that box, or its score is worse, it is a mistake.
    assert match_detections(expected, found, suppression._replace(candidates=expected))[3] > 0
    worse = with_row(found, 2, scores=0.45)
    suppression = Suppression(joined(expected, [x[2:3] for x in worse]), 0.6, 100)
    assert match_detections(expected, worse, suppression).num_unmatched > 0


def test_what_the_loser_of_a_tie_had_suppressed_may_come_back():
    winner = with_row(detections(1), 0, boxes=torch.tensor([0.0, 0, 20, 20]))
    loser = with_row(winner, 0, boxes=torch.tensor([4.0, 0, 24, 20]))  # IoU 16/24 = 0.67
    third = with_row(winner, 0, boxes=torch.tensor([-4.0, 0, 16, 20]), scores=0.3)  # 12/28 with it
    candidates = joined(joined(winner, loser), third)

    match = match_detections(winner, joined(loser, third), Suppression(candidates, 0.6, 100))

    assert match.num_unmatched == 0 and match.num_ties == 2
    # Without a tie there is no reason for the third to be there.
    match = match_detections(winner, joined(winner, third), Suppression(candidates, 0.6, 100))
    assert match.num_unmatched == 1


def test_last_place_may_go_to_either_of_two_equal_scores():
    expected = detections()
    other = with_row([x[4:] for x in expected], 0, boxes=torch.tensor([300.0, 0, 320, 20]))
    found = joined([x[:4] for x in expected], other)
    candidates = joined(expected, other)

    assert match_detections(expected, found, Suppression(candidates, 0.6, 5))[2:] == (1, 0)
    # With room for six, the loser has no reason to be missing.
    assert match_detections(expected, found, Suppression(candidates, 0.6, 6)).num_unmatched == 1


def test_box_that_nms_would_have_removed_is_noticed():
    overlapping = with_row(detections(1), 0, boxes=torch.tensor([2.0, 0, 22, 20]), scores=0.7)
    candidates = joined(detections(), overlapping)  # IoU 18/22 with the first

    match = match_detections(detections(), candidates, Suppression(candidates, 0.6, 100))

    assert match.num_unmatched == 1


def test_numbers_that_are_not_finite_have_no_partner():
    found = with_row(detections(), 2, boxes=torch.tensor([float("nan"), 60, 80, 80]))
    assert match_detections(detections(), found).num_unmatched == 2
    found = with_row(detections(), 2, scores=float("nan"))
    assert match_detections(detections(), found).num_unmatched > 0


@pytest.mark.parametrize("output", [0, 1, 2])
def test_raw_heads_are_compared_though_nothing_scores(output):
    model = tiny_detector().eval()
    torch.nn.init.constant_(model.proposal_generator.head.cls_logits.bias, -12.0)
    right = ExportableDetector(model, "raw heads")

    def run(images, change=0.0):
        outputs = list(right(images))
        outputs[output] = outputs[output] + change
        return outputs

    def passes(change):
        wrong = functools.partial(run, change=change)
        [row] = compare_with_eager(model, wrong, [(100, 120)], stage="raw heads")
        return row.passed

    assert passes(0.0) and not passes(float("nan")) and not passes(3.0)


def test_every_box_a_little_off_is_noticed_though_all_scores_agree():
    model = tiny_detector().eval()
    spread_scores(model)

    def shifted(images):
        boxes, scores, classes = detect_as_tensors(model, images)
        return boxes + 0.5, scores, classes

    [row] = compare_with_eager(model, shifted, [(100, 120)])
    assert not row.passed


def test_table_names_the_size_that_failed():
    rows = [
        ComparisonRow((10, 20), 3, 3, Difference(0.0, 0.0, 0, 0)),
        ComparisonRow((30, 40), 3, 3, Difference(0.5, 0.0, 0, 0)),
    ]
    lines = format_table(rows).splitlines()
    assert lines[1].endswith("ok") and lines[2].split()[:3] == ["30", "x", "40"]
    assert lines[2].endswith("FAILED")


def test_sizes_are_odd_small_portrait_and_larger_than_traced():
    odd, small, portrait, larger = sizes_to_compare((256, 320))  # height, width
    assert all(side % 2 and side % 32 for side in odd)
    assert max(small) < 128
    assert portrait[0] > portrait[1]
    assert all(a > b for a, b in zip(larger, (256, 320)))


def test_spread_scores_leaves_scores_on_both_sides_of_the_threshold():
    model = tiny_detector(head=dict(deformable=True)).eval()
    spread_scores(model)

    found = model([{"image": torch.rand(3, 128, 160) * 255}])[0]["instances"]
    offsets = model.proposal_generator.head.cls_tower[0].conv_offset.weight

    assert len(found) > 10 and found.scores.std() > 0.05
    assert offsets.abs().max() > 0


def test_metadata_says_what_a_user_needs():
    config = get_config("toy/atss_toy")
    names = class_names_of(config, 6)
    model = tiny_detector(num_classes=6)
    rule = resize_rule(config)
    metadata = collect_metadata(
        model, "x/a.onnx", "onnx", 2, resize=rule, class_names=names, opset=20
    )

    assert metadata["file"] == "a.onnx"
    assert metadata["input"]["shape"] == [2, 3, "height", "width"]
    assert metadata["channel_order"] == "BGR"
    assert metadata["mean"] == [127.0] * 3 and metadata["std"] == [60.0] * 3
    assert metadata["resize"]["short_edge"] == 256
    assert metadata["strides"] == [8, 16, 32, 64, 128]
    assert metadata["class_names"][0] == "rectangle" and len(metadata["class_names"]) == 6
    assert metadata["score"]["formula"] == "sqrt(sigmoid(logit) * sigmoid(centerness))"
    assert [o["name"] for o in metadata["outputs"]][-1] == "image_idxs"
    assert {"atss", "torch", "torchvision", "detectron2", "onnx_opset"} <= set(metadata["versions"])


def test_wrong_number_of_class_names_is_refused():
    with pytest.raises(ValueError, match="2 class names, but the model has 3 classes"):
        collect_metadata(tiny_detector(), "a.pt", "torchscript", class_names=["a", "b"])


def test_lazy_and_yaml_configs_have_the_same_resize_rule_and_names():
    for name, num_classes in (("coco/atss_R_50_FPN_1x", 80), ("toy/atss_toy", 6)):
        lazy = get_config(name)
        yacs = load_yaml_config(str(REPO / "configs" / f"{name}.yaml"))
        assert resize_rule(lazy) == resize_rule(yacs)
        assert resize_rule(lazy)["long_edge_at_most"] == 1333
        names = class_names_of(lazy, num_classes)
        assert names == class_names_of(yacs, num_classes) and len(names) == num_classes
        assert class_names_of(lazy, 3) is None  # names of another data set
