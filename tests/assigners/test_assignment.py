"""Assignments: samples and their dense forms, ignored anchors, what a step makes and uploads."""

import copy

import pytest
import torch
from atss import anchor_grid as grid_module
from atss import device
from atss.anchor_grid import AnchorGrid
from atss.assigners import (
    ATSSAssigner,
    IoUAssigner,
    SimOTAAssigner,
    SSCAssigner,
    TopKAssigner,
    resolve_claims,
)
from atss.assigners import assignment as assignment_module
from atss.geometry import box_centers
from atss.losses import background
from atss.predictions import PredictionsAt
from atss.targets import label_anchors
from conftest import make_grid, make_input, make_instances, random_boxes, tiny_detector
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from detectron2.structures import Boxes, ImageList

STRIDES = (8, 16, 32, 64, 128)


def test_dense_forms_name_the_object_within_its_image():
    # Objects 0 and 1 in the first image, 2 in the third; anchors of an image are 0 to 3.
    assignment = resolve_claims(
        torch.tensor([[0, 1], [1, 2], [3, 0]]),
        torch.tensor([[True, True], [True, False], [True, False]]),
        torch.tensor([[0.5, 0.5], [0.9, 0.9], [0.1, 0.1]]),
        num_objects=[2, 0, 1],
        num_anchors=4,
    )
    assert assignment.image_idxs.tolist() == [0, 0, 0, 0, 2, 2]
    assert assignment.object_idxs.tolist() == [0, 0, 1, 1, 2, 2]
    assert assignment.match_labels.tolist() == [[1, 1, 0, 0], [0] * 4, [0, 0, 0, 1]]
    assert assignment.matched_idxs[0, :2].tolist() == [0, 1] and assignment.matched_idxs[2, 3] == 0
    assert assignment.objects_without_positives().tolist() == [False] * 3


class IgnoringATSS(ATSSAssigner):
    """A rule with candidates that also ignores anchors: those that touch an object and lost."""

    def __call__(self, anchors, gt_boxes):
        assignment = super().__call__(anchors, gt_boxes)
        labels = assignment.match_labels
        is_ignored = torch.zeros_like(labels, dtype=torch.bool)
        is_ignored[assignment.image_idxs, assignment.anchor_idxs] = True
        assignment.is_ignored = is_ignored & (labels == 0)
        return assignment


def test_rule_with_few_samples_and_ignored_anchors_has_both_respected():
    model = tiny_detector(assigner=IgnoringATSS()).train()
    core = model.proposal_generator
    features = {
        name: torch.rand(1, 64, -(-64 // s), -(-96 // s))
        for name, s in zip(core.in_features, STRIDES)
    }
    instances = [make_instances([[8, 8, 60, 50]], [1])]
    grid = core.anchor_generator.grid(list(features.values()))
    assignment = core.assigner(grid, [x.gt_boxes for x in instances])
    assert assignment.is_ignored.sum() > 10 and assignment.is_positive.sum() > 3
    predictions = core.head(list(features.values()))
    logits = [level.detach().requires_grad_() for level in predictions.logits]
    core.head.forward = lambda _: type(predictions)(
        logits, predictions.deltas, predictions.quality, 1
    )
    images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    core(images, features, instances)[1]["loss_cls"].backward()
    gradient = torch.cat([level.grad.flatten(2) for level in logits], dim=2).abs().sum(dim=1)
    assert torch.equal(gradient == 0, assignment.is_ignored)


def storages(values):
    tensors = [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): x for x in tensors}


class FullSizeArrays(TorchDispatchMode):
    """Arrays as large as all anchors of the batch that operators make: views are none."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.made = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for pointer, x in storages(out).items():
            if x.numel() >= self.least and pointer not in given:
                self.made.append((func.overloadpacket.__name__, tuple(x.shape)))
        return out


def count_step(monkeypatch, assigner, num_images=2, size=(512, 512), prepare=1):
    """Full-size arrays and uploads of a step of assignment and loss, on a padded size seen."""
    uploads = []

    def counting(values, *args, **kwargs):
        uploads.append(values)
        return device.host_constant(values, *args, **kwargs)

    for module in (grid_module, assignment_module):
        monkeypatch.setattr(module, "host_constant", counting)
    # The scratch of the class loss has the size of a cache, not of the anchors.
    monkeypatch.setattr(background, "_BLOCK", 64)
    model = tiny_detector(assigner=assigner)
    core = model.proposal_generator
    features = [torch.rand(num_images, 64, -(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    with torch.no_grad():
        predictions = core.head(features)
    gt = [make_instances(random_boxes(5, *size), torch.randint(3, (5,))) for _ in range(num_images)]

    def step():
        grid = core.anchor_generator.grid(features)
        at = PredictionsAt(predictions, grid, core.box2box_transform)
        return core.loss(predictions, grid, label_anchors(core.assigner, grid, gt, 3, at))

    for _ in range(prepare):
        step()
    uploads.clear()
    num_anchors = core.anchor_generator.grid(features).num_anchors
    with FullSizeArrays(num_images * num_anchors) as arrays:
        step()
    return arrays.made, uploads


def test_step_of_atss_makes_one_full_size_array_and_uploads_one_constant(monkeypatch):
    full_size, uploads = count_step(monkeypatch, ATSSAssigner())
    assert len(full_size) == 1 and full_size[0][0] == "full", full_size
    assert uploads == [[5, 5]]  # numbers of objects


def test_step_at_a_new_padded_size_uploads_a_few_constants_more(monkeypatch):
    _, uploads = count_step(monkeypatch, ATSSAssigner(), prepare=0)
    assert 1 < len(uploads) <= 8, uploads


@pytest.mark.parametrize(
    "assigner, most",
    [(SimOTAAssigner(), 1), (TopKAssigner(), None), (IoUAssigner(), None), (SSCAssigner(), None)],
    ids=lambda a: type(a).__name__,
)
def test_other_rules_upload_no_more_constants_than_the_numbers_of_objects(
    monkeypatch, assigner, most
):
    full_size, uploads = count_step(monkeypatch, assigner)
    print(type(assigner).__name__, len(full_size), "full-size arrays,", len(uploads), "uploads")
    assert len(uploads) <= 1
    assert most is None or len(full_size) <= most


def test_grids_of_the_last_padded_sizes_are_kept():
    generator = tiny_detector().proposal_generator.anchor_generator
    features = [torch.zeros(1, 1, -(-64 // s), -(-96 // s)) for s in STRIDES]
    first = generator.grid(features)
    assert generator.grid(features) is first
    for width in range(40):
        generator.grid([torch.zeros(1, 1, 2, width + 1) for _ in STRIDES])
        assert generator.grid(features) is first  # used in between, so it stays
    for width in range(40):
        generator.grid([torch.zeros(1, 1, 2, width + 1) for _ in STRIDES])
    assert len(generator._grids) == 16 and generator.grid(features) is not first


def test_kept_grid_is_made_anew_when_what_it_was_made_of_changes():
    generator = tiny_detector().proposal_generator.anchor_generator
    features = [torch.zeros(1, 1, -(-64 // s), -(-96 // s)) for s in STRIDES]

    def agrees():
        ours = [level.tensor for level in generator.grid(features).boxes]
        return all(map(torch.equal, ours, [level.tensor for level in generator(features)]))

    assert agrees()
    generator.offset = 0.0
    assert agrees()
    generator.strides = [2 * stride for stride in generator.strides]
    assert agrees()
    next(iter(generator.cell_anchors)).mul_(1.01)
    generator.half().float()  # rounds the cell anchors
    assert agrees()
    assert copy.deepcopy(generator)._grids == {} and generator._grids != {}


@pytest.mark.parametrize("num_cells", [1, 3])
def test_boxes_computed_from_places_are_the_bits_of_the_grid(num_cells):
    cells = [torch.randn(num_cells, 2).abs() * s for s in (8, 16, 32)]
    cells = [torch.cat((-c, c), dim=1) for c in cells]
    grid = AnchorGrid([(7, 11), (4, 6), (1, 1)], [8, 16, 32], cells, offset=0.3)
    expected = torch.cat([level.tensor for level in grid.boxes])
    assert torch.equal(grid.boxes_at(torch.arange(grid.num_anchors)), expected)
    order = torch.randint(grid.num_anchors, (5, 4))
    assert torch.equal(grid.boxes_at(order), expected[order])


def test_values_of_samples_that_are_not_positive_have_no_influence():
    class Undefined(ATSSAssigner):
        def __call__(self, anchors, gt_boxes):
            assignment = super().__call__(anchors, gt_boxes)
            values = torch.where(assignment.is_positive, 1.0, float("nan"))
            assignment.class_targets = assignment.box_weights = values
            return assignment

    loss = dict(class_normalizer="targets")
    losses = tiny_detector(assigner=Undefined(), loss=loss)(
        [make_input(boxes=[[8.0, 8, 60, 50]], classes=[1])]
    )
    assert all(value.isfinite() for value in losses.values())


def test_anchor_that_a_rule_calls_positive_and_ignored_is_ignored():
    class Both(ATSSAssigner):
        def __call__(self, anchors, gt_boxes):
            assignment = super().__call__(anchors, gt_boxes)
            assignment.is_ignored = torch.ones_like(assignment.match_labels, dtype=torch.bool)
            return assignment

    losses = tiny_detector(assigner=Both())([make_input(boxes=[[8.0, 8, 60, 50]], classes=[1])])
    assert all(value == 0 for value in losses.values())


def test_rescued_object_takes_the_nearest_of_anchors_that_fit_alike():
    grid = make_grid(128, 128, num_levels=1)
    tiny = Boxes(torch.tensor([[64.2, 63.9, 64.3, 64.0]]))  # inside many anchors: equal IoUs
    assignment = ATSSAssigner(min_positives_per_gt=1)(grid, [tiny])
    (anchor,) = assignment.anchor_idxs[assignment.is_positive].tolist()
    distances = (box_centers(grid.boxes[0].tensor) - box_centers(tiny.tensor)).norm(dim=1)
    assert distances[anchor] == distances.min()


def test_soft_targets_and_box_weights_of_an_assignment_win_over_those_of_the_loss():
    class Weighted(ATSSAssigner):
        def __call__(self, anchors, gt_boxes):
            assignment = super().__call__(anchors, gt_boxes)
            size = assignment.anchor_idxs.shape
            assignment.class_targets, assignment.box_weights = torch.zeros(size), torch.zeros(size)
            return assignment

    losses = {}
    for assigner in (ATSSAssigner(), Weighted()):
        torch.manual_seed(0)
        model = tiny_detector(assigner=assigner)
        boxes = Boxes(torch.tensor([[8.0, 8.0, 60.0, 50.0]]))
        inputs = {"image": torch.ones(3, 64, 96), "instances": make_instances(boxes.tensor, [1])}
        losses[type(assigner)] = model([inputs])
    assert losses[Weighted]["loss_box_reg"] == 0 < losses[ATSSAssigner]["loss_box_reg"]
    # A class target of 0 makes positives background, which costs a new head far less.
    assert losses[Weighted]["loss_cls"] < losses[ATSSAssigner]["loss_cls"]
