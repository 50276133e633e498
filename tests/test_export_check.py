"""The comparison of a file with its model notices what is wrong, and only that."""

import pytest
import torch
from atss.export_check import (
    CheckRow,
    check_sizes,
    compare_with_eager,
    format_table,
    match_detections,
)
from atss.export_metadata import class_names_of, describe, resize_rule
from atss.export_modules import detect_as_tensors
from atss.export_samples import spread_scores
from atss.model_zoo import get_config
from atss.yaml_config import load_yaml_config
from conftest import REPO, tiny_detector

NAMES = ["boxes", "scores", "classes"]


def detections(count=5):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * 50
    boxes = torch.cat((corners, corners + 20), dim=1)
    return [boxes, torch.linspace(0.9, 0.1, count), torch.arange(count) % 3]


def compare(expected, found, names=NAMES):
    return match_detections((100, 100), expected, found, names)


def test_equal_detections_pass_in_any_order():
    expected = detections()
    order = torch.tensor([1, 0, 2, 4, 3])
    assert compare(expected, [x[order] for x in expected]).passed


@pytest.mark.parametrize("field, change", [(0, 0.02), (1, 2e-4), (2, 1)])
def test_box_score_or_class_that_differs_fails(field, change):
    found = detections()
    found[field] = found[field].clone()
    found[field][2] += change

    row = compare(detections(), found)

    assert not row.passed and row.num_unmatched == 2  # one of each side


def test_detection_that_lacks_or_repeats_fails():
    expected = detections()
    assert not compare(expected, [x[:-1] for x in expected]).passed
    assert not compare(expected, [torch.cat((x, x[-1:])) for x in expected]).passed
    assert not compare(expected, [x[:0] for x in expected]).passed
    assert compare([x[:0] for x in expected], [x[:0] for x in expected]).passed


def test_another_choice_among_candidates_of_equal_score_is_a_tie():
    expected, found = detections(), detections()
    found[0] = found[0].clone()
    found[0][4] += 30  # another box, the same score
    candidates = [torch.cat((a, b[4:])) for a, b in zip(expected, found)]

    row = match_detections((100, 100), expected, found, NAMES, candidates)

    assert row.passed and row.num_ties == 1
    assert not match_detections((100, 100), expected, found, NAMES, expected).passed


def test_detection_of_another_image_is_no_partner():
    expected = [*detections(), torch.tensor([0, 0, 0, 1, 1])]
    found = [*detections(), torch.tensor([0, 0, 1, 1, 1])]

    assert match_detections((9, 9), expected, found, [*NAMES, "image_idxs"]).num_unmatched == 2


def test_every_box_a_little_off_is_noticed_though_all_scores_agree():
    model = tiny_detector().eval()
    spread_scores(model)

    def shifted(images):
        boxes, scores, classes = detect_as_tensors(model, images)
        return boxes + 0.5, scores, classes

    [row] = compare_with_eager(model, shifted, [(100, 120)])
    assert not row.passed


def test_table_names_the_size_that_failed():
    good = CheckRow((10, 20), 3, 3, 0.0, 0.0, 0, 0)
    lines = format_table([good, good._replace(size=(30, 40), box_difference=0.5)]).splitlines()
    assert lines[1].endswith("ok") and lines[2].split()[:3] == ["30", "x", "40"]
    assert lines[2].endswith("FAILED")


def test_sizes_are_odd_small_portrait_and_larger_than_traced():
    odd, small, portrait, larger = check_sizes((256, 320))  # height, width
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


def test_description_says_what_a_user_needs():
    config = get_config("toy/atss_toy")
    names = class_names_of(config, 6)
    model = tiny_detector(num_classes=6)
    rule = resize_rule(config)
    described = describe(model, "x/a.onnx", "onnx", 2, resize=rule, class_names=names, opset=20)

    assert described["file"] == "a.onnx"
    assert described["input"]["shape"] == [2, 3, "height", "width"]
    assert described["channel_order"] == "BGR"
    assert described["mean"] == [127.0] * 3 and described["std"] == [60.0] * 3
    assert described["resize"]["short_edge"] == 256
    assert described["strides"] == [8, 16, 32, 64, 128]
    assert described["class_names"][0] == "rectangle" and len(described["class_names"]) == 6
    assert described["score"]["formula"] == "sqrt(sigmoid(logit) * sigmoid(centerness))"
    assert [o["name"] for o in described["outputs"]][-1] == "image_idxs"
    assert {"atss", "torch", "torchvision", "detectron2", "onnx_opset"} <= set(
        described["versions"]
    )


def test_wrong_number_of_class_names_is_refused():
    with pytest.raises(ValueError, match="2 class names, but the model has 3 classes"):
        describe(tiny_detector(), "a.pt", "torchscript", class_names=["a", "b"])


def test_lazy_and_yaml_configs_have_the_same_resize_rule_and_names():
    for name, num_classes in (("coco/atss_R_50_FPN_1x", 80), ("toy/atss_toy", 6)):
        lazy = get_config(name)
        yacs = load_yaml_config(str(REPO / "configs" / f"{name}.yaml"))
        assert resize_rule(lazy) == resize_rule(yacs)
        assert resize_rule(lazy)["long_edge_at_most"] == 1333
        names = class_names_of(lazy, num_classes)
        assert names == class_names_of(yacs, num_classes) and len(names) == num_classes
        assert class_names_of(lazy, 3) is None  # names of another data set
