"""Algorithm 1: candidates, adaptive threshold, centre test, conflicts."""

import time

import numpy as np
import pytest
import torch
from atss.anchor_grid import AnchorGrid
from atss.assigners import ATSSAssigner, adaptive_threshold, resolve_claims
from atss.assigners.candidates import _window_ranks, nearest_anchors, nearest_on_lattice
from conftest import golden_cases, golden_grid, grown, make_grid, random_boxes
from reference import atss_assignment
from reference_assigners import object_of_each_anchor

from detectron2.structures import Boxes


def owners(assignment):
    """For each anchor of the only image its object, or -1."""
    (found,) = object_of_each_anchor(assignment)
    return found


def random_layout(rng):
    """Small grids of every kind, with boxes that tie, touch borders, or lie outside."""
    num_levels = rng.integers(1, 5)
    num_cells = int(rng.choice([1, 1, 1, 2, 3, 9]))
    height, width = rng.integers(1, 13, 2)
    strides = [8.0 * 2**i for i in range(num_levels)]
    sizes = [(max(1, height >> i), max(1, width >> i)) for i in range(num_levels)]
    cells = []
    for stride in strides:
        half = stride * rng.choice([1.0, 2.0, 4.0], (num_cells, 2)) * rng.choice([1.0, 1.25])
        cells.append(torch.as_tensor(np.concatenate((-half, half), axis=1)).float())
    offset = float(rng.choice([0.5, 0.5, 0.0]))
    grid = AnchorGrid([(int(h), int(w)) for h, w in sizes], strides, cells, offset)

    count = rng.integers(0, 7)
    extent = np.array([width, height]) * 8.0
    centers = rng.random((count, 2)) * extent * 1.6 - 0.3 * extent
    sides = np.exp(rng.uniform(np.log(3), np.log(1.5 * extent.max() + 4), (count, 2)))
    style = rng.integers(0, 4)
    if style == 1:  # on and halfway between lattice points: distances tie
        centers = np.round(centers / 4) * 4
        sides = np.round(sides / 4) * 4 + 4
    elif style == 2:  # integer boxes
        centers, sides = np.round(centers), np.round(sides / 2) * 2 + 2
    boxes = np.concatenate((centers - sides / 2, centers + sides / 2), axis=1)
    if style == 3 and count > 1:  # the same object twice
        boxes[1] = boxes[0]
    return grid, torch.as_tensor(boxes).float().view(-1, 4), int(rng.choice([1, 2, 3, 9, 15]))


def test_agrees_with_brute_force_on_2000_random_layouts():
    rng = np.random.default_rng(0)
    num_positives = num_conflicts = 0
    for _ in range(2000):
        grid, boxes, topk = random_layout(rng)
        margin = float(rng.choice([0.01, 0.51]))
        inside = bool(rng.random() < 0.8)
        assigner = ATSSAssigner(topk, margin, center_in_gt=inside)
        levels = [level.tensor.numpy() for level in grid.boxes]
        expected = atss_assignment(
            levels, grid.num_cell_anchors, boxes.numpy(), topk, margin, inside
        )
        assignment = assigner(grid, [Boxes(boxes)])
        assert owners(assignment) == expected.tolist(), (grid.grid_sizes, boxes, topk)
        num_positives += (expected >= 0).sum()
        num_conflicts += len(boxes)
    assert num_positives > 5000 and num_conflicts > 5000  # the layouts do test something


def test_list_of_boxes_gives_the_same_as_the_grid():
    rng = np.random.default_rng(1)
    for _ in range(200):
        grid, boxes, topk = random_layout(rng)
        on_grid = ATSSAssigner(topk)(grid, [Boxes(boxes)])
        on_list = ATSSAssigner(topk, anchors_per_location=grid.num_cell_anchors)(
            grid.boxes, [Boxes(boxes)]
        )
        assert owners(on_grid) == owners(on_list)


@pytest.mark.parametrize("file", ["assign_atss", "assign_atss_ties"])
def test_every_decided_anchor_is_as_in_the_authors_release(file):
    num_cases = 0
    for case, fields in golden_cases(file):
        grid = golden_grid(fields)
        # Half a pixel more on each side of a box is half a pixel more of margin.
        assigner = ATSSAssigner(case["topk"], center_margin=0.51)
        found = torch.tensor(owners(assigner(grid, [Boxes(grown(fields["gt_boxes"]))])))
        decided = fields.get("decided", torch.ones(len(found), dtype=torch.bool))
        assert (found == fields["gt_index"])[decided].all(), case["name"]
        num_cases += 1
    assert num_cases >= 3


def test_nearest_on_lattice_equals_a_full_search_far_outside_and_near_ties():
    generator = torch.Generator().manual_seed(3)
    for topk in (1, 2, 5, 9, 19):
        grid = make_grid(200, 312, num_levels=4)
        centers = torch.rand(300, 2, generator=generator) * 3000 - 1200
        # A hair off the middle between columns: there rounding can make neighbours tie.
        centers[:150] = (centers[:150] / 4).round() * 4
        centers[:100] += (torch.rand(100, 2, generator=generator) - 0.5) * 2e-3
        fast, full = (
            nearest_on_lattice(grid, centers, topk),
            nearest_anchors(grid.boxes, centers, topk),
        )
        assert torch.equal(fast.anchor_idxs, full.anchor_idxs)
        assert torch.equal(fast.boxes, full.boxes)


def test_equally_near_locations_are_taken_in_row_major_order():
    grid = AnchorGrid([(2, 2)], [8], [torch.tensor([[-8.0, -8.0, 8.0, 8.0]])])
    candidates = nearest_on_lattice(grid, torch.tensor([[8.0, 8.0]]), topk=3)
    assert candidates.anchor_idxs.tolist() == [[0, 1, 2]]


def test_threshold_is_mean_plus_unbiased_deviation():
    ious = torch.tensor([[0.1, 0.2, 0.6]])  # mean 0.3; squared steps 0.04 + 0.01 + 0.09 over 2
    torch.testing.assert_close(adaptive_threshold(ious), torch.tensor([[0.3 + 0.07**0.5]]))


def test_threshold_of_a_single_candidate_is_its_iou():
    assert adaptive_threshold(torch.tensor([[0.4], [0.0]])).tolist() == [
        [pytest.approx(0.4)],
        [0.0],
    ]


def test_equal_ious_all_reach_their_threshold():
    # One level, a huge object: every candidate lies wholly inside, so all IoUs are the same.
    grid = AnchorGrid([(12, 12)], [8], [torch.tensor([[-5.0, -5.0, 5.0, 5.0]])])
    assignment = ATSSAssigner(topk=9)(grid, [Boxes(torch.tensor([[-30.0, -30.0, 130.0, 130.0]]))])
    assert (assignment.match_labels == 1).sum() == 9


def test_anchor_claimed_by_two_objects_goes_to_the_higher_priority():
    anchor_idxs = torch.tensor([[0, 1], [0, 1]])  # two objects, both with anchors 0 and 1
    is_claimed = torch.tensor([[True, False], [True, False]])
    priority = torch.tensor([[0.4, 0.9], [0.6, 0.9]])

    assignment = resolve_claims(anchor_idxs, is_claimed, priority, num_objects=[2], num_anchors=2)

    assert assignment.match_labels.tolist() == [[1, 0]]  # nobody claims the second anchor
    assert assignment.matched_idxs[0, 0] == 1  # 0.6 > 0.4
    assert assignment.is_positive.tolist() == [False, False, True, False]


@pytest.mark.parametrize("priorities, winner", [([0.5, 0.5], 0), ([-3.0, -2.0], 1), ([-1, 0.0], 1)])
def test_claims_of_equal_priority_go_to_the_earlier_object_and_negative_ones_count(
    priorities, winner
):
    anchor_idxs = torch.zeros(2, 1, dtype=torch.int64)
    priority = torch.tensor(priorities).view(2, 1)
    assignment = resolve_claims(anchor_idxs, torch.ones(2, 1).bool(), priority, [2], 1)
    assert assignment.matched_idxs.item() == winner


def test_same_anchor_of_two_images_is_two_anchors():
    anchor_idxs = torch.zeros(2, 1, dtype=torch.int64)
    claimed = torch.ones(2, 1).bool()
    assignment = resolve_claims(anchor_idxs, claimed, torch.rand(2, 1), [1, 1], 3)
    assert assignment.match_labels.tolist() == [[1, 0, 0], [1, 0, 0]]
    assert assignment.matched_idxs[:, 0].tolist() == [0, 0]


def test_batch_equals_its_images_one_by_one():
    grid = make_grid(160, 224)
    batch = [random_boxes(n, 160, 224) for n in (3, 0, 7, 1)]
    assigner = ATSSAssigner()
    together = object_of_each_anchor(assigner(grid, [Boxes(b) for b in batch]))
    assert together == [owners(assigner(grid, [Boxes(boxes)])) for boxes in batch]


def test_doubling_everything_changes_nothing():
    grid = make_grid(160, 160)
    double = AnchorGrid(
        grid.grid_sizes, [2 * s for s in grid.strides], [2 * c for c in grid.cell_anchors]
    )
    boxes = random_boxes(6, 160, 160)
    found = owners(ATSSAssigner(center_margin=0.01)(grid, [Boxes(boxes)]))
    doubled = owners(ATSSAssigner(center_margin=0.02)(double, [Boxes(2 * boxes)]))
    assert found == doubled


def test_object_without_candidate_inside_gets_no_anchor_and_is_counted():
    grid = make_grid(64, 64)
    tiny = torch.tensor([[10.0, 10.0, 11.0, 11.0]])  # no location lies in a pixel off the lattice
    assignment = ATSSAssigner()(grid, [Boxes(tiny)])
    assert (assignment.match_labels == 1).sum() == 0
    assert assignment.objects_without_positives().tolist() == [True]


def test_min_positives_rescues_an_object_with_its_best_candidate():
    grid = make_grid(64, 64)
    boxes = torch.tensor([[10.0, 10.0, 11.0, 11.0], [8.0, 8.0, 56.0, 56.0]])
    plain = ATSSAssigner()(grid, [Boxes(boxes[1:])])
    rescued = ATSSAssigner(min_positives_per_gt=1)(grid, [Boxes(boxes)])
    assert owners(rescued).count(0) == 1
    # The object that had positives keeps them, but for the one that was better for the tiny one.
    assert owners(rescued).count(1) >= owners(plain).count(0) - 1


def test_window_is_all_pairs_of_ranks_that_can_qualify_and_fast_to_find():
    for topk in range(1, 40):
        ranks = range(1, topk + 2)
        expected = {
            (a - 1, b - 1) for a in ranks for b in ranks if a * b - min(a, 2) * min(b, 2) < topk
        }
        pairs = list(zip(*_window_ranks(topk)))
        assert set(pairs) == expected and len(pairs) == len(expected)
    start = time.process_time()
    assert len(_window_ranks(10_000)[0]) < 120_000
    assert time.process_time() - start < 3  # 27 s while all 10^8 pairs were tried


def test_more_candidates_than_there_are_locations_are_all_of_them():
    grid = make_grid(256, 256)
    boxes = [Boxes(random_boxes(5, 256, 256))]
    everything = ATSSAssigner(topk=1024)(grid, boxes)
    assert torch.equal(ATSSAssigner(topk=10_000)(grid, boxes).match_labels, everything.match_labels)
