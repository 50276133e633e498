"""IoU, SSC and top-k: against slow twins, the authors' data, hand-worked cases and their limits."""

import weakref

import pytest
import torch
from atss.anchor_grid import AnchorGrid, concatenate_anchors
from atss.assigners import ATSSAssigner, IoUAssigner, SSCAssigner, TopKAssigner
from atss.assigners.pairwise import chunk_size, pairwise_ious
from conftest import golden_cases, golden_grid, grown, random_boxes
from reference_assigners import (
    iou_rule,
    object_of_each_anchor,
    random_layout,
    ssc_rule,
    to_boxes,
    topk_rule,
)
from torch.utils._python_dispatch import TorchDispatchMode

from detectron2.structures import Boxes, pairwise_iou

NUM_LAYOUTS = 500
INF = float("inf")


def grid_of(layout):
    cells = [torch.tensor(cells) for cells in layout.cells]
    return AnchorGrid(layout.grid_sizes, layout.strides, cells)


def assign(assigner, layout, as_grid=True):
    grid = grid_of(layout)
    boxes = [to_boxes(boxes) for boxes in layout.images]
    return object_of_each_anchor(assigner(grid if as_grid else grid.boxes, boxes))


def iou_case(seed, layout, budget):
    low, high = ((0.4, 0.5), (0.2, 0.6), (0.5, 0.5))[seed % 3]
    low_quality, center_in_gt = bool(seed & 1), bool(seed & 2)
    assigner = IoUAssigner((low, high), low_quality, center_in_gt, budget=budget)
    return assigner, iou_rule(layout, low, high, low_quality, center_in_gt, margin=0.01)


def ssc_case(seed, layout, budget):
    ranges = ((-1, 12), (12, 24), (24, INF))[-len(layout.strides) :]
    radius = (None, 1.5, 0.5)[seed % 3]
    margin = (0.0, 0.01, 2.0)[seed % 5 % 3]
    assigner = SSCAssigner(ranges, radius, margin, strides=layout.strides, budget=budget)
    return assigner, ssc_rule(layout, ranges, radius, margin)


def topk_case(seed, layout, budget):
    topk = (1, 4, 9, 1000)[seed % 4]
    return TopKAssigner(topk, budget=budget), topk_rule(layout, topk, margin=0.01)


# A tiny budget makes every layout go through many chunks; both must give the twin's answer.
@pytest.mark.parametrize("budget", [2**22, 150])
@pytest.mark.parametrize("case", [iou_case, ssc_case, topk_case])
def test_rule_agrees_with_its_slow_twin_on_random_layouts(case, budget):
    found = []
    for seed in range(NUM_LAYOUTS):
        layout = random_layout(seed)
        assigner, expected = case(seed, layout, budget)
        assert assign(assigner, layout, as_grid=bool(seed & 4)) == expected, seed
        found += [g for image in expected for g in image]
    assert sum(g >= 0 for g in found) > 1000  # the comparison was about something
    assert case is not iou_case or found.count(-2) > 1000  # ignored ones too


# In the authors' inclusive pixels IoU is ours once boxes are grown by half a pixel, which turns
# their in-box margin of 0.01 into 0.51. SSC has no IoU: its boxes stay as they are.
@pytest.mark.parametrize(
    "name, assigner, grow",
    [
        ("assign_iou", IoUAssigner(center_in_gt=True, center_margin=0.51), True),
        ("assign_ssc", SSCAssigner(center_margin=0.01), False),
        ("assign_topk", TopKAssigner(center_margin=0.51), True),
    ],
)
def test_authors_assignment_is_reproduced_on_every_anchor(name, assigner, grow):
    num_cases = num_positives = 0
    for case, fields in golden_cases(name):
        if name == "assign_topk":
            assert case["topk"] == assigner.topk
        boxes = Boxes(grown(fields["gt_boxes"]) if grow else fields["gt_boxes"])
        anchors = golden_grid(fields, grow).boxes
        (owners,) = object_of_each_anchor(assigner(anchors, [boxes]))
        assert owners == fields["gt_index"].tolist(), case["name"]
        num_cases += 1
        num_positives += case["num_pos"]
    assert num_cases >= 3 and num_positives > 100


def test_authors_fcos_with_and_without_center_sampling_is_reproduced_on_every_location():
    radii = set()
    for case, fields in golden_cases("assign_fcos"):
        strides = fields["strides"].tolist()
        grid_sizes = [tuple(size) for size in fields["grid_sizes"].tolist()]
        cells = [torch.tensor([[-1.0, -1.0, 1.0, 1.0]])] * len(strides)
        # Their locations i * s + s // 2 are ours at (i + 1/2) * s: all strides are even.
        grid = AnchorGrid(grid_sizes, strides, cells)
        radius = case["center_sampling_radius"] or None
        radii.add(radius)
        assigner = SSCAssigner(center_sampling_radius=radius)
        (owners,) = object_of_each_anchor(assigner(grid, [Boxes(fields["gt_boxes"])]))
        assert owners == fields["gt_index"].tolist(), case["name"]
    assert radii == {None, 1.5}


def test_low_quality_match_learns_the_object_it_overlaps_most():
    # Matcher's own semantics: the anchor is object 1's best (IoU 0.1) but overlaps object 0 more
    # (0.25), so it is positive and learns object 0.
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0], [30.0, 0.0, 40.0, 10.0]]))]
    gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 10.0, 2.5], [0.0, 9.0, 10.0, 10.0]]))
    assignment = IoUAssigner()(anchors, [gt_boxes])
    assert object_of_each_anchor(assignment) == [[0, -1]]
    without = IoUAssigner(allow_low_quality_matches=False)(anchors, [gt_boxes])
    assert object_of_each_anchor(without) == [[-1, -1]]


def test_positive_with_center_outside_its_object_is_ignored_only_if_asked():
    # IoU 60 / 140 = 0.43 is in the band but the best of the object; the centre (5, 5) is outside.
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0]]))]
    gt_boxes = Boxes(torch.tensor([[6.0, 0.0, 10.0, 10.0]]))
    assert IoUAssigner()(anchors, [gt_boxes]).match_labels.tolist() == [[1]]
    assert IoUAssigner(center_in_gt=True)(anchors, [gt_boxes]).match_labels.tolist() == [[-1]]


def test_object_that_overlaps_no_anchor_does_not_make_every_anchor_positive():
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0], [10.0, 0.0, 20.0, 10.0]]))]
    no_area = Boxes(torch.tensor([[3.0, 3.0, 3.0, 3.0], [500.0, 500.0, 510.0, 510.0]]))
    assert IoUAssigner()(anchors, [no_area]).match_labels.tolist() == [[0, 0]]
    # Beside one that overlaps, indices must still point to the right object.
    gt_boxes = Boxes.cat([no_area, Boxes(torch.tensor([[10.0, 0.0, 20.0, 10.0]]))])
    assert object_of_each_anchor(IoUAssigner()(anchors, [gt_boxes])) == [[-1, 2]]


def test_smallest_object_wins_a_point_inside_several():
    anchors = [Boxes(torch.tensor([[4.0, 4.0, 12.0, 12.0]]))]  # centre (8, 8)
    gt_boxes = Boxes(torch.tensor([[0.0, 0, 16, 16], [4.0, 4, 12, 12], [4.0, 4, 12, 12]]))
    assigner = SSCAssigner(((-1, INF),))
    # Object 1 is smaller than 0, and earlier than its equal 2.
    assert object_of_each_anchor(assigner(anchors, [gt_boxes])) == [[1]]


def test_size_range_of_a_level_includes_both_ends():
    # One anchor per level, centre (64, 64); l, t, r, b of the object are all 64.
    anchor = Boxes(torch.tensor([[60.0, 60.0, 68.0, 68.0]]))
    gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 128.0, 128.0]]))
    assigner = SSCAssigner(((-1, 64), (64, 128), (128, INF)))
    assert object_of_each_anchor(assigner([anchor] * 3, [gt_boxes])) == [[0, 0, -1]]


def test_center_sampling_keeps_points_less_than_radius_strides_from_the_center():
    grid = AnchorGrid([(1, 8)], [8], [torch.tensor([[-4.0, -4.0, 4.0, 4.0]])])
    gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 64.0, 8.0]]))  # centre (32, 4)
    everywhere = ((-1, INF),)
    assert sum(map(sum, SSCAssigner(everywhere)(grid, [gt_boxes]).match_labels.tolist())) == 8
    # Points at x = 28 and 36 are 4 px away, 20 and 44 are 12 px: exactly 1.5 strides, so excluded.
    assignment = SSCAssigner(everywhere, center_sampling_radius=1.5)(grid, [gt_boxes])
    assert assignment.match_labels.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]


def test_topk_gives_equal_overlaps_to_the_nearer_anchor():
    # Both anchors overlap the object with IoU 0; the second centre is nearer and inside.
    anchors = [Boxes(torch.tensor([[90.0, 0.0, 98.0, 8.0], [40.0, 40.0, 48.0, 48.0]]))]
    gt_boxes = Boxes(torch.tensor([[44.0, 44.0, 44.0, 44.0]]))
    assigner = TopKAssigner(topk=1, center_margin=-1.0)
    assert object_of_each_anchor(assigner(anchors, [gt_boxes])) == [[-1, 0]]


ALL_RULES = [
    ATSSAssigner(),
    IoUAssigner(),
    IoUAssigner(center_in_gt=True),
    SSCAssigner(((-1, 64), (64, INF))),
    SSCAssigner(((-1, 64), (64, INF)), center_sampling_radius=1.5),
    TopKAssigner(topk=3),
]


def two_levels():
    cells = [torch.tensor([[-s, -s, s, s]]) * 4.0 for s in (8.0, 16.0)]
    return AnchorGrid([(8, 10), (4, 5)], [8, 16], cells)


@pytest.mark.parametrize("assigner", ALL_RULES, ids=lambda a: type(a).__name__)
def test_image_without_objects_is_all_background(assigner):
    nothing = Boxes(torch.zeros(0, 4))
    one = Boxes(torch.tensor([[10.0, 10.0, 60.0, 50.0]]))
    assignment = assigner(two_levels(), [nothing, one, nothing])
    assert assignment.match_labels.shape == (3, 100)
    assert assignment.match_labels.dtype == torch.int8
    assert assignment.matched_idxs.dtype == torch.int64
    assert [(labels == 1).any().item() for labels in assignment.match_labels] == [
        False,
        True,
        False,
    ]
    assert assignment.num_objects == [0, 1, 0] and (assignment.match_labels[::2] == 0).all()
    for batch in ([], [nothing, nothing]):
        empty = assigner(two_levels(), batch)
        assert empty.match_labels.shape == (len(batch), 100) and (empty.match_labels == 0).all()
        assert len(empty.anchor_idxs) == len(empty.object_idxs) == 0
        assert empty.objects_without_positives().shape == (0,)


@pytest.mark.parametrize("assigner", ALL_RULES, ids=lambda a: type(a).__name__)
def test_samples_name_every_positive_exactly_once_and_none_that_is_ignored(assigner):
    gt_boxes = [Boxes(random_boxes(count, 64, 80, low=16)) for count in (5, 0, 2)]
    assignment = assigner(two_levels(), gt_boxes)
    places = torch.stack((assignment.image_idxs, assignment.anchor_idxs), dim=1)
    expected = (assignment.match_labels == 1).nonzero().tolist()
    assert sorted(places[assignment.is_positive].tolist()) == expected and len(expected) > 3
    assert (assignment.object_idxs < 7).all()
    if isinstance(assigner, (ATSSAssigner, TopKAssigner)):  # the samples are the candidates
        assert assignment.object_idxs.unique(return_counts=True)[1].unique().numel() == 1
        assert assignment.object_idxs.unique().tolist() == list(range(7))


@pytest.mark.parametrize("assigner", ALL_RULES, ids=lambda a: type(a).__name__)
def test_order_of_objects_permutes_the_assignment(assigner):
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(6, 2, generator=generator) * 40
    boxes = torch.cat((corners, corners + torch.rand(6, 2, generator=generator) * 40 + 5), dim=1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    (owners,) = object_of_each_anchor(assigner(two_levels(), [Boxes(boxes)]))
    (permuted,) = object_of_each_anchor(assigner(two_levels(), [Boxes(boxes[order])]))
    assert [order[g].item() if g >= 0 else g for g in permuted] == owners
    assert max(owners) > 0


class FloatsHeld(TorchDispatchMode):
    """Most float32 values alive at once in results of operations, from a given size on."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes() // 4
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize(
    "assigner",
    [
        IoUAssigner(budget=60_000),
        SSCAssigner(center_sampling_radius=1.5, budget=60_000),
        TopKAssigner(budget=60_000),
    ],
    ids=lambda a: type(a).__name__,
)
def test_dense_rules_hold_less_than_one_matrix_above_their_budget(assigner):
    strides = [8, 16, 32, 64, 128]
    cells = [torch.tensor([[-4.0, -4.0, 4.0, 4.0]]) * stride for stride in strides]
    sizes = [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 200
    boxes = torch.cat((corners, corners + 5 + torch.rand(200, 2, generator=generator) * 80), dim=1)
    grid = AnchorGrid(sizes, strides, cells)
    num_anchors = len(concatenate_anchors(grid))
    with FloatsHeld() as held:
        assigner(grid, [Boxes(boxes)])
    matrix = len(boxes) * num_anchors  # 272 800
    assert held.peak < matrix / 2
    # Beside the budget: per-anchor values (boxes, centers, ranges) and the columns of `Matcher`.
    assert held.peak < 60_000 + 60 * num_anchors


def test_pairwise_ious_are_those_of_detectron2():
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(50, 4, generator=generator) * 30
    boxes[:, 2:] += boxes[:, :2]
    boxes[3, 2:] = boxes[3, :2]  # without area
    ious = pairwise_ious(boxes, boxes[10:])
    expected = pairwise_iou(Boxes(boxes), Boxes(boxes[10:]))
    torch.testing.assert_close(ious, expected, rtol=0, atol=0)


def test_chunks_cover_everything_once_even_beyond_the_budget():
    assert chunk_size(100, 250) == 2
    assert chunk_size(1000, 10) == 1  # at least one item
    assert chunk_size(0, 10) == 10


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: IoUAssigner((0.5, 0.4)), "low <= high.*model.assigner.thresholds"),
        (lambda: IoUAssigner((0.0, 0.5)), "0 < low"),
        (lambda: IoUAssigner((0.4,)), "two thresholds"),
        (lambda: IoUAssigner((0.4, 1.5)), "1.5"),
        (lambda: IoUAssigner(thresholds=0.5), "two thresholds.*got 0.5.*assigner.thresholds"),
        (lambda: IoUAssigner(("a", "b")), "two thresholds.*'a', 'b'"),
        (lambda: IoUAssigner(center_in_gt="no"), "center_in_gt.*True, False.*got 'no'"),
        (lambda: SSCAssigner(((-1, 64), (96, INF))), "gap.*64 px.*96 px.*size_ranges"),
        (lambda: SSCAssigner(((64, -1), (64, INF))), "least <"),
        (lambda: SSCAssigner(((64, INF), (-1, 64))), "fine to coarse"),
        (lambda: SSCAssigner(()), "pairs"),
        (lambda: SSCAssigner(center_sampling_radius=0.0), "center_sampling_radius.*None"),
        (lambda: TopKAssigner(0), "topk >= 1, got 0.*model.assigner.topk"),
        (lambda: TopKAssigner(2.5), "integer topk"),
        (lambda: TopKAssigner(True), "integer topk"),
        (lambda: TopKAssigner(budget=0), "budget"),
        (lambda: ATSSAssigner(topk=0), "topk >= 1, got 0.*model.assigner.topk"),
        (lambda: ATSSAssigner(topk=1.5), "integer topk"),
        (lambda: ATSSAssigner(topk="9"), "integer topk"),
        (lambda: ATSSAssigner(center_in_gt=None), "got None.*model.assigner.center_in_gt"),
        (lambda: ATSSAssigner(center_margin=INF), "finite center_margin, got inf"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_to_change(make, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        make()


def test_size_ranges_that_do_not_match_the_levels_are_refused():
    with pytest.raises(ValueError, match="5 size ranges.*2 levels.*model.assigner.size_ranges"):
        SSCAssigner()(two_levels(), [Boxes(torch.zeros(0, 4))])
    with pytest.raises(ValueError, match="3 strides.*2 levels.*model.assigner.strides"):
        ranges = ((-1, 64), (64, INF))
        SSCAssigner(ranges, 1.5, strides=(8, 16, 32))(two_levels().boxes, [])
