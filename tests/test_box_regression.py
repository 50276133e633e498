"""Axis 2: codes of boxes and points."""

import pytest
import torch
from atss.box_regression import Box2BoxTransform, PointToBoxTransform
from conftest import golden_cases, grown, random_boxes

from detectron2.modeling.box_regression import Box2BoxTransform as Detectron2Transform

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@pytest.mark.parametrize(
    "case, fields", golden_cases("box_coding"), ids=lambda v: v.get("name", "")
)
def test_codes_are_those_of_the_authors_release(case, fields):
    anchors, gt_boxes = fields["anchors"], fields["gt_boxes"]
    if case["regression_type"] == "BOX":
        transform, anchors, gt_boxes = Box2BoxTransform(WEIGHTS), grown(anchors), grown(gt_boxes)
        to_legacy = torch.tensor([0.5, 0.5, -0.5, -0.5])  # what `grown` added
    else:
        # Points measure the boxes as they are; only the anchors' size counts the last pixel.
        transform = PointToBoxTransform(case["anchor_size0"] / case["stride0"])
        anchors, to_legacy = grown(anchors), torch.zeros(4)
    expected = fields["encoded"]
    torch.testing.assert_close(
        transform.get_deltas(anchors, gt_boxes), expected, rtol=1e-5, atol=1e-4
    )
    for deltas, boxes in (("encoded", "decoded_encoded"), ("deltas", "decoded_deltas")):
        free = fields[deltas]
        if case["regression_type"] == "POINT" and (free < 0).any():
            # The release has its ReLU in the head; ours is in the transform.
            keep = (free >= 0).all(dim=1)
            assert keep.any()
        else:
            keep = torch.ones(len(free), dtype=torch.bool)
        found = transform.apply_deltas(free, anchors) + to_legacy
        torch.testing.assert_close(found[keep], fields[boxes][keep], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("transform", [Box2BoxTransform(WEIGHTS), PointToBoxTransform(8.0)])
def test_decode_undoes_encode(transform):
    boxes = random_boxes(50, 300, 300, low=20)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    anchors = torch.cat((centers - 32, centers + 32), dim=1) + 3.0  # centres inside their boxes
    deltas = transform.get_deltas(anchors, boxes)
    torch.testing.assert_close(transform.apply_deltas(deltas, anchors), boxes, rtol=0, atol=1e-3)


def test_box_codes_are_detectron2s():
    anchors, boxes = random_boxes(20, 200, 200), random_boxes(20, 200, 200)
    torch.testing.assert_close(
        Box2BoxTransform(WEIGHTS).get_deltas(anchors, boxes),
        Detectron2Transform(weights=WEIGHTS).get_deltas(anchors, boxes),
    )
    assert isinstance(Box2BoxTransform(WEIGHTS), Detectron2Transform)


def test_codes_of_boxes_without_area_are_finite():
    anchors = torch.tensor([[0.0, 0.0, 64.0, 64.0]]).expand(3, 4)
    boxes = torch.tensor([[8.0, 8, 40, 8], [8, 8, 8, 40], [8, 8, 8, 8]])
    transform = Box2BoxTransform(WEIGHTS)
    deltas = transform.get_deltas(anchors, boxes)
    assert deltas.isfinite().all()
    torch.testing.assert_close(transform.apply_deltas(deltas, anchors), boxes, rtol=0, atol=1e-4)


def test_negative_distances_count_as_zero():
    anchor = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    found = PointToBoxTransform().apply_deltas(torch.tensor([[-3.0, 1.0, 2.0, -1.0]]), anchor)
    assert found.tolist() == [[32.0, 24.0, 48.0, 32.0]]  # stride 8: 32 - 0, 32 - 8, 32 + 16, 32 + 0


def test_point_codes_do_not_depend_on_the_anchor_scale():
    center, box = torch.tensor([[40.0, 40.0]]), torch.tensor([[8.0, 16.0, 80.0, 64.0]])
    for scale in (5.0, 8.0, 9.0):
        anchor = torch.cat((center - 4 * scale, center + 4 * scale), dim=1)  # stride 8
        found = PointToBoxTransform(scale).get_deltas(anchor, box)
        torch.testing.assert_close(found, torch.tensor([[4.0, 3.0, 5.0, 3.0]]))


@pytest.mark.parametrize("scale", [0, "8", float("inf")])
def test_scale_that_is_not_positive_is_refused(scale):
    words = f"finite anchor_scale .*size / stride.* > 0, got {scale!r}.*box2box_transform.anchor_s"
    with pytest.raises(ValueError, match=words):
        PointToBoxTransform(scale)
