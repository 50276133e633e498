"""Proposals of a first stage: their logits, numbers per level and image, and what is removed."""

import pytest
import torch
from atss.postprocessing import ProposalSelector, SelectionInputs
from atss.postprocessing.proposals import log_scores, log_to_logits
from atss.predictions import DensePredictions

from detectron2.structures import Boxes


def far_apart(count, size=10.0):
    corners = torch.arange(count).float() * 2 * size
    return torch.stack((corners, 0 * corners, corners + size, 0 * corners + size), dim=1)


def add_deltas(deltas, anchors):
    return anchors + deltas


def one_level(logits, centerness=None):
    """Predictions of one level with one anchor per location and deltas 0."""
    logits = torch.as_tensor(logits, dtype=torch.float32).view(1, 1, 1, -1)
    if centerness is not None:
        centerness = [torch.as_tensor(centerness, dtype=torch.float32).view(1, 1, 1, -1)]
    return DensePredictions([logits], [logits.new_zeros(1, 4, 1, logits.shape[3])], centerness, 1)


def select(predictions, anchors, training=False, image_size=(100, 1000), **options):
    selector = ProposalSelector(**options)
    anchors = [Boxes(boxes) for boxes in anchors]
    inputs = SelectionInputs(predictions, anchors, [image_size], add_deltas)
    return selector(inputs, training)[0]


def test_logit_of_the_final_score_for_numbers_worked_out_by_hand():
    # class 0.8, centerness 0.2: score sqrt(0.16) = 0.4, logit log(0.4 / 0.6)
    predictions = one_level(torch.logit(torch.tensor([0.8])), torch.logit(torch.tensor([0.2])))
    proposals = select(predictions, [far_apart(1)])
    expected = torch.logit(torch.tensor([0.4]))
    torch.testing.assert_close(proposals.objectness_logits, expected)
    product = log_scores(predictions.logits[0], predictions.quality[0], sqrt_score=False)
    torch.testing.assert_close(product.exp(), torch.tensor([[0.16]]))


def test_without_centerness_the_logits_are_those_of_the_head():
    logits = [2.0, 0.5, -3.0, -30.0]
    proposals = select(one_level(logits), [far_apart(4)])
    torch.testing.assert_close(proposals.objectness_logits, torch.tensor(logits))


def test_logits_are_finite_and_keep_the_order_of_scores_that_float32_cannot_tell_apart():
    logits = log_to_logits(torch.tensor([-1000.0, -999.0, -20.0, -1e-30, 0.0]))
    assert torch.isfinite(logits).all()
    assert (logits.diff() > 0).all()
    assert (logits[0].sigmoid() == logits[1].sigmoid()).item()


def test_training_and_evaluation_have_numbers_of_their_own():
    options = dict(pre_nms_topk=(5, 4), post_nms_topk=(3, 2))
    predictions = one_level([0, 1, 2, 3, 4, 5])
    assert len(select(predictions, [far_apart(6)], training=True, **options)) == 3
    proposals = select(predictions, [far_apart(6)], training=False, **options)
    assert proposals.objectness_logits.tolist() == pytest.approx([5, 4])
    assert proposals.proposal_boxes.tensor[:, 0].tolist() == [100, 80]  # anchors 5 and 4


def test_number_before_nms_counts_per_level():
    predictions = one_level([3, 2, 1])
    predictions = DensePredictions(predictions.logits * 2, predictions.deltas * 2, None, 1)
    anchors = far_apart(6)
    proposals = select(predictions, [anchors[:3], anchors[3:]], pre_nms_topk=(2, 2))
    assert len(proposals) == 4


def test_nms_works_across_levels():
    predictions = one_level([3])
    predictions = DensePredictions(
        [predictions.logits[0], predictions.logits[0] + 1], predictions.deltas * 2, None, 1
    )
    proposals = select(predictions, [far_apart(1), far_apart(1)])
    assert proposals.objectness_logits.tolist() == pytest.approx([4])


def test_boxes_outside_the_image_or_too_small_are_removed():
    boxes = torch.tensor([[0.0, 0, 10, 10], [90, 0, 120, 10], [110, 0, 120, 10], [50, 0, 53, 10]])
    proposals = select(one_level([4, 3, 2, 1]), [boxes], image_size=(50, 100), min_box_size=5.0)
    assert proposals.proposal_boxes.tensor.tolist() == [[0, 0, 10, 10], [90, 0, 100, 10]]


def test_predictions_that_are_not_finite_stop_training_and_are_left_out_of_evaluation():
    predictions = one_level([1.0, float("nan"), 2.0])
    with pytest.raises(FloatingPointError, match="not finite"):
        select(predictions, [far_apart(3)], training=True)
    assert len(select(predictions, [far_apart(3)])) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pre_nms_topk=(0, 1)), "integer pre_nms_topk >= 1.*PRE_NMS_TOPK_TRAIN"),
        (dict(post_nms_topk=(5,)), "post_nms_topk as two numbers >= 1"),
        (dict(pre_nms_topk=1000), "pre_nms_topk as two numbers >= 1.*got 1000.*PRE_NMS_TOPK"),
        (dict(nms_thresh=1.5), "1.5"),
        (dict(min_box_size=-1), "-1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProposalSelector(**options)
