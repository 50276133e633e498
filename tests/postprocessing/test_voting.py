"""Tests of box voting: groups, means and softened boxes, against plain loops and the release."""

import numpy as np
import pytest
import reference_voting
import torch
from atss.postprocessing import Detections
from atss.postprocessing.voting import vote_boxes
from conftest import golden_cases


def random_candidates(num_boxes, num_objects, num_classes, seed):
    """Boxes around objects, with scores that are all different."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(16), np.log(300), (num_objects, 2)))
    centers = rng.uniform(0, 600, (num_objects, 2))
    of = rng.integers(0, num_objects, num_boxes)
    center = centers[of] + rng.normal(0, 0.06, (num_boxes, 2)) * sizes[of]
    size = sizes[of] * np.exp(rng.normal(0, 0.1, (num_boxes, 2)))
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1).astype(np.float32)
    scores = (rng.permutation(num_boxes) + 1).astype(np.float32) / (num_boxes + 1)
    classes = rng.integers(0, num_classes, num_objects)[of]
    return Detections(*(torch.from_numpy(x) for x in (boxes, scores, classes)))


def candidates_of(boxes, scores, classes):
    return Detections(torch.tensor(boxes), torch.tensor(scores), torch.tensor(classes))


@pytest.mark.parametrize("max_pairs", [1, 1000])
def test_groups_do_not_depend_on_how_the_work_is_split(monkeypatch, max_pairs):
    candidates = random_candidates(500, 40, 3, seed=1)
    whole = vote_boxes(candidates)
    monkeypatch.setattr("atss.postprocessing.voting._MAX_PAIRS", max_pairs)

    split = vote_boxes(candidates)

    for one, other in zip(whole, split):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "num_boxes, num_objects, num_classes",
    [(1, 1, 1), (40, 5, 1), (400, 30, 1), (600, 50, 7), (2500, 120, 1)],
)
def test_votes_are_those_of_the_plain_loops(soft, num_boxes, num_objects, num_classes):
    candidates = random_candidates(num_boxes, num_objects, num_classes, seed=num_boxes)

    voted = vote_boxes(candidates, 0.66, soft)

    expected = reference_voting.vote_boxes(*(part.tolist() for part in candidates), 0.66, soft)
    scores, classes, boxes = (torch.tensor(column) for column in zip(*expected))
    torch.testing.assert_close(voted.scores, scores, rtol=0, atol=1e-6)
    assert voted.classes.tolist() == classes.tolist()
    torch.testing.assert_close(voted.boxes, boxes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("case, fields", golden_cases("vote"), ids=lambda v: v.get("name", ""))
def test_votes_are_those_of_the_release_but_for_lone_boxes(case, fields):
    grow = torch.tensor([0.0, 0.0, 1.0, 1.0])  # inclusive pixels to continuous ones
    labels = fields.get("labels", torch.zeros(len(fields["boxes"]))).long()
    candidates = Detections(fields["boxes"] + grow, fields["scores"], labels)

    voted = vote_boxes(
        candidates, case["vote_thresh"], "soft" in case["kind"], case["soft_score_thresh"]
    )

    if len(candidates.boxes) == 1:  # which the release loses
        assert torch.equal(voted.boxes, candidates.boxes)
        return
    order = fields["out_scores"].argsort(descending=True, stable=True)
    torch.testing.assert_close(voted.scores, fields["out_scores"][order], rtol=0, atol=1e-6)
    torch.testing.assert_close(voted.boxes - grow, fields["out_boxes"][order], rtol=0, atol=1e-3)
    if "out_labels" in fields:
        assert voted.classes.tolist() == fields["out_labels"][order].tolist()


def test_lone_boxes_stay_bit_for_bit():
    boxes, scores = [[0.1, 0.2, 10.3, 20.7], [50.0, 50.0, 60.1, 71.3]], [0.3, 0.9]

    voted = vote_boxes(candidates_of(boxes, scores, [0, 0]))

    assert torch.equal(voted.boxes, torch.tensor(boxes[::-1]))
    assert torch.equal(voted.scores, torch.tensor(scores[::-1]))


def test_boxes_of_different_classes_do_not_vote_together():
    box = [0.0, 0.0, 10.0, 10.0]
    voted = vote_boxes(candidates_of([box, box], [0.5, 0.4], [0, 1]))
    assert voted.classes.tolist() == [0, 1]


def test_iou_at_the_threshold_joins():
    # (0, 0, 4, 4) and (0, 0, 4, 2): IoU 8 / 16 = 0.5 exactly
    candidates = candidates_of([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0]], [0.75, 0.25], [0, 0])
    voted = vote_boxes(candidates, vote_thresh=0.5, soft=False)
    assert voted.boxes.tolist() == [[0.0, 0.0, 4.0, 3.5]]  # 0.75 * 4 + 0.25 * 2


def test_members_come_back_softened():
    # IoU 8 / 10 = 0.8 with the head: 0.5 * (1 - 0.8) = 0.1 comes back, 0.2 * 0.2 = 0.04 does not
    head, member = [0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 8.0, 1.0]
    voted = vote_boxes(candidates_of([head, member, member], [0.9, 0.5, 0.2], [0, 0, 0]))
    torch.testing.assert_close(voted.scores, torch.tensor([0.9, 0.1]))
    assert voted.boxes[1].tolist() == member


def test_values_that_are_not_finite_are_left_out():
    nan, inf = float("nan"), float("inf")
    boxes = [[0.0, 0.0, 9.0, 9.0], [nan, 0.0, 9.0, 9.0], [0.0, 0.0, inf, 9.0], [1.0, 1.0, 5.0, 5.0]]
    voted = vote_boxes(candidates_of(boxes, [0.5, 0.9, 0.8, nan], [0, 0, 0, 0]))
    assert voted.boxes.tolist() == [boxes[0]]


def test_boxes_without_area_are_kept_alone():
    voted = vote_boxes(candidates_of([[3.0, 3.0, 3.0, 3.0]] * 2, [0.5, 0.4], [0, 0]))
    assert voted.scores.tolist() == pytest.approx([0.5, 0.4])


def test_nothing_in_nothing_out():
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert [len(part) for part in vote_boxes(empty)] == [0, 0, 0]


@pytest.mark.parametrize("thresh", [0.0, 1.0, -1.0, 66])
def test_threshold_outside_its_range_is_refused(thresh):
    with pytest.raises(ValueError, match="VOTE_THRESH"):
        vote_boxes(random_candidates(3, 1, 1, 0), thresh)
