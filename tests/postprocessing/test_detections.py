"""From raw predictions to detections."""

import dataclasses

import numpy as np
import pytest
import torch
from atss.box_regression import Box2BoxTransform
from atss.postprocessing import Detections, DetectionSelector, SelectionInputs
from atss.postprocessing.eager import suppress
from atss.predictions import DensePredictions, flatten_level
from conftest import golden_cases, golden_grid, make_grid, random_boxes, random_predictions
from reference import detections

from detectron2.structures import Boxes

DECODE = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).apply_deltas


def decode_half_a_pixel_off(deltas, anchors):
    return DECODE(deltas, anchors) + 0.5


def detect(predictions, anchors, image_sizes, decode=DECODE, **settings):
    inputs = SelectionInputs(predictions, anchors, image_sizes, decode)
    return DetectionSelector(**settings)(inputs)


@pytest.mark.parametrize(
    "case, fields", golden_cases("postprocess"), ids=lambda v: v.get("name", "")
)
def test_detections_are_those_of_the_authors_release(case, fields):
    # The release's boxes in inclusive pixels: (x1, y1, x2, y2) is our (x1, y1, x2 + 1, y2 + 1), and
    # our decoded boxes, from grown anchors, lie half a pixel up and left of those.
    grid = golden_grid(fields)
    maps = ([fields[f"{name}{i}"] for i in range(5)] for name in ("cls", "reg", "ctr"))
    sizes = [tuple(size) for size in fields["image_sizes"].tolist()]
    found = detect(
        DensePredictions(*maps, grid.num_cell_anchors), grid.boxes, sizes,
        decode_half_a_pixel_off,
        score_thresh=case["score_thresh"], topk_candidates=case["pre_nms_top_n"],
        nms_thresh=case["nms_thresh"], detections_per_image=case["detections_per_img"],
    )  # fmt: skip
    for i, result in enumerate(found):
        expected = fields[f"out_boxes{i}"] + torch.tensor([0.0, 0, 1, 1])
        # Boxes that begin beyond the last pixel are left one pixel by the release, and dropped or
        # left a sliver by us; both lists are compared without them, up to where the shorter ends.
        expected_inside, ours_inside = (
            begins_inside(boxes, sizes[i]) for boxes in (expected, result.pred_boxes.tensor)
        )
        count = min(int(expected_inside.sum()), int(ours_inside.sum()))
        assert count >= 0.8 * len(expected)
        scores = fields[f"out_scores{i}"]
        classes = fields[f"out_labels{i}"].long() - 1
        for ours, theirs, tolerance in (
            (result.pred_boxes.tensor, expected, 1e-3),
            (result.scores, scores, 1e-5),
            (result.pred_classes, classes, 0),
        ):
            torch.testing.assert_close(
                ours[ours_inside][:count], theirs[expected_inside][:count], rtol=0, atol=tolerance
            )


def begins_inside(boxes, size):
    height, width = size
    return (
        (boxes[:, 0] < width - 1)
        & (boxes[:, 1] < height - 1)
        & (boxes[:, 2] > 1)
        & (boxes[:, 3] > 1)
    )


@pytest.mark.parametrize("topk, most", [(1000, 100), (20, 10)])
def test_detections_agree_with_loops(topk, most):
    grid, size = make_grid(64, 96), (60, 90)
    predictions = random_predictions(grid.grid_sizes, 1, 3, scale=1.5)
    settings = dict(topk_candidates=topk, detections_per_image=most)
    (found,) = detect(predictions, grid.boxes, [size], **settings)
    levels = []
    for i, anchors in enumerate(grid.boxes):
        logits, deltas, ctr = (
            flatten_level(maps[i], 1)[0]
            for maps in (predictions.logits, predictions.deltas, predictions.quality)
        )
        boxes = DECODE(deltas, anchors.tensor)
        boxes = torch.stack([boxes[:, j].clamp(0, size[1 - j % 2]) for j in range(4)], dim=1)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        logits[area == 0] = -20  # wholly outside
        levels.append((logits.sigmoid().numpy(), ctr.sigmoid().squeeze(1).numpy(), boxes.numpy()))
    expected = detections(levels, topk=topk, max_detections=most)
    assert len(found) == len(expected) > 0.7 * most
    boxes, scores, classes = zip(*expected)
    np.testing.assert_allclose(found.pred_boxes.tensor, boxes, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    assert found.pred_classes.tolist() == list(classes)


def candidates_of_two(logits, quality=None, **settings):
    """Candidates among two locations of one class, whose boxes lie beside each other."""
    maps = [None if x is None else [x.view(1, 1, 1, 2)] for x in (logits, quality)]
    predictions = DensePredictions(maps[0], [torch.zeros(1, 4, 1, 2)], maps[1], num_anchors=1)
    anchors = [Boxes(torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16]]))]
    inputs = SelectionInputs(predictions, anchors, [(16, 16)], DECODE)
    (found,) = DetectionSelector(**settings).candidates(inputs)
    return found


def test_class_score_is_compared_before_centerness_multiplies_in():
    # Sigmoid 0.5 and 0.018. A low centerness must not remove the first.
    logits, quality = torch.tensor([0.0, -4.0]), torch.tensor([-6.0, 6.0])
    found = candidates_of_two(logits, quality)
    assert found.boxes.tolist() == [[0.0, 0.0, 8.0, 8.0]]
    score = 0.5 / (1 + np.exp(6.0))
    assert found.scores.item() == pytest.approx(score**0.5, rel=1e-5)
    plain = candidates_of_two(logits, quality, sqrt_score=False)
    assert plain.scores.item() == pytest.approx(score, rel=1e-5)


def test_score_just_above_the_threshold_is_a_candidate_and_one_just_below_is_none():
    logit = torch.tensor(0.05).logit()
    found = candidates_of_two(torch.stack((logit + 1e-5, logit - 1e-5)))
    assert found.boxes.tolist() == [[0.0, 0.0, 8.0, 8.0]]


@pytest.mark.parametrize("num_cells", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fast_and_traceable_detections_are_the_same(num_cells, memory_format):
    sizes = ((16, 24), (8, 12))
    predictions = random_predictions(sizes, 2, 5, num_cells, scale=1.5)
    predictions = predictions.map(lambda x: x.contiguous(memory_format=memory_format))
    anchors = [Boxes(random_boxes(h * w * num_cells, 128, 192)) for h, w in sizes]
    selector = DetectionSelector(topk_candidates=150, detections_per_image=60)
    image_sizes = [(128, 192), (100, 150)]
    inputs = SelectionInputs(predictions, anchors, image_sizes, decode_half_a_pixel_off)
    fast, plain = selector(inputs), selector.in_graph(inputs)
    for ours, other in zip(fast, plain):
        assert len(ours) == 60
        torch.testing.assert_close(ours.pred_boxes.tensor, other.boxes)
        torch.testing.assert_close(ours.scores, other.scores)
        assert torch.equal(ours.pred_classes, other.classes)


@pytest.mark.parametrize("copies", [1, 30])
def test_suppression_looks_as_far_as_it_must(copies):
    # 30 copies of each box: the best 40 contain two boxes to keep, so the window has to grow.
    boxes = random_boxes(60, 200, 200).repeat_interleave(copies, dim=0)
    scores = torch.linspace(1, 0.1, len(boxes))
    candidates = Detections(boxes, scores, torch.arange(60).repeat_interleave(copies) % 7)
    everything = suppress(candidates, 0.6, max_detections=-1)
    assert len(everything.scores) <= 60
    best = suppress(candidates, 0.6, max_detections=10)
    for ours, expected in zip(best, everything.at(slice(10))):
        assert torch.equal(ours, expected)


def test_suppression_is_per_class_and_spares_equal_iou():
    # IoU of the first two is 8 / 16; the third repeats the first in another class.
    boxes = torch.tensor([[0.0, 0, 4, 3], [0, 1, 4, 4], [0, 0, 4, 3]])
    candidates = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1]))
    for options, kept in (
        (dict(nms_thresh=0.5), [0, 1, 2]),
        (dict(nms_thresh=0.49), [0, 2]),
        (dict(nms_thresh=0.5, max_detections=1), [0]),
    ):
        for ours, part in zip(suppress(candidates, **options), candidates):
            assert torch.equal(ours, part[kept])


def test_batch_equals_its_images_one_by_one():
    grid = make_grid(64, 64)
    predictions = random_predictions(grid.grid_sizes, 3, 2, scale=1.5)
    sizes = [(64, 64), (50, 60), (64, 40)]
    together = detect(predictions, grid.boxes, sizes, DECODE)
    for i, size in enumerate(sizes):
        single = predictions.map(lambda maps, i=i: maps[i : i + 1])
        (alone,) = detect(single, grid.boxes, [size])
        assert torch.equal(together[i].pred_boxes.tensor, alone.pred_boxes.tensor)
        assert torch.equal(together[i].scores, alone.scores)


def test_image_without_candidates_has_no_detections():
    grid = make_grid(64, 64)
    predictions = random_predictions(grid.grid_sizes, 1, 2, scale=1.5)
    logits = [torch.full_like(t, -20.0) for t in predictions.logits]
    (found,) = detect(dataclasses.replace(predictions, logits=logits), grid.boxes, [(64, 64)])
    assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"score_thresh": 2}, r"score_thresh in \[0, 1\], got 2. Change model.selector.score"),
        ({"nms_thresh": -0.1}, "nms_thresh.*got -0.1"),
        ({"topk_candidates": 0}, "integer topk_candidates >= 1, got 0"),
        ({"detections_per_image": 1.5}, "integer detections_per_image"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DetectionSelector(**settings)


def test_head_with_more_outputs_per_anchor_is_refused_and_never_guessed():
    grid = make_grid(64, 64)
    predictions = random_predictions(grid.grid_sizes, 1, 2, scale=1.5)
    odd = [torch.zeros(1, 68, *size) for size in grid.grid_sizes]  # 17 bins a side
    with pytest.raises(ValueError, match="deltas have 68 channels, but A\\*4 = 4"):
        detect(dataclasses.replace(predictions, deltas=odd), grid.boxes, [(64, 64)])
