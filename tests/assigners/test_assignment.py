"""Assignments: samples and their dense forms, ignored anchors, what a step makes and uploads."""

import dataclasses

import pytest
import torch
from atss import anchor_grid as grid_module
from atss import device
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
from conftest import (
    feature_maps,
    make_grid,
    make_input,
    make_instances,
    random_boxes,
    tiny_detector,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from detectron2.structures import Boxes, ImageList


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


def atss_with(change):
    """ATSS whose assignments are changed before they are returned."""

    class Changed(ATSSAssigner):
        def __call__(self, anchors, gt_boxes):
            assignment = super().__call__(anchors, gt_boxes)
            change(assignment)
            return assignment

    return Changed()


def one_object():
    return [make_input(boxes=[[8.0, 8, 60, 50]], classes=[1])]


def test_rule_with_few_samples_and_ignored_anchors_has_both_respected():
    def ignore_candidates_that_lost(assignment):
        labels = assignment.match_labels
        is_ignored = torch.zeros_like(labels, dtype=torch.bool)
        is_ignored[assignment.image_idxs, assignment.anchor_idxs] = True
        assignment.is_ignored = is_ignored & (labels == 0)

    core = tiny_detector(assigner=atss_with(ignore_candidates_that_lost)).proposal_generator
    features = feature_maps(64, 96, channels=64)
    instances = [x["instances"] for x in one_object()]
    assignment = core.assigner(core.anchor_generator.grid(features), [instances[0].gt_boxes])
    assert assignment.is_ignored.sum() > 10 and assignment.is_positive.sum() > 3
    predictions = core.head(features)
    logits = [level.detach().requires_grad_() for level in predictions.logits]
    core.head.forward = lambda _: dataclasses.replace(predictions, logits=logits)
    images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    losses = core(images, dict(zip(core.in_features, features)), instances)[1]
    losses["loss_cls"].backward()
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
    features = feature_maps(*size, num_images, 64)
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
    assert len(uploads) <= 1
    assert most is None or len(full_size) <= most


def test_values_of_samples_that_are_not_positive_have_no_influence():
    def leave_undefined(assignment):
        values = torch.where(assignment.is_positive, 1.0, float("nan"))
        assignment.class_targets = assignment.box_weights = values

    loss = dict(class_normalizer="targets")
    losses = tiny_detector(assigner=atss_with(leave_undefined), loss=loss)(one_object())
    assert all(value.isfinite() for value in losses.values())


def test_anchor_that_a_rule_calls_positive_and_ignored_is_ignored():
    def ignore_all(assignment):
        assignment.is_ignored = torch.ones_like(assignment.match_labels, dtype=torch.bool)

    losses = tiny_detector(assigner=atss_with(ignore_all))(one_object())
    assert all(value == 0 for value in losses.values())


def test_soft_targets_and_box_weights_of_an_assignment_win_over_those_of_the_loss():
    def weigh_by_zero(assignment):
        size = assignment.anchor_idxs.shape
        assignment.class_targets, assignment.box_weights = torch.zeros(size), torch.zeros(size)

    model, inputs = tiny_detector(), one_object()
    plain = model(inputs)
    model.proposal_generator.assigner = atss_with(weigh_by_zero)
    weighted = model(inputs)
    assert weighted["loss_box_reg"] == 0 < plain["loss_box_reg"]
    # A class target of 0 makes positives background, which costs a new head far less.
    assert weighted["loss_cls"] < plain["loss_cls"]


def test_rescued_object_takes_the_nearest_of_anchors_that_fit_alike():
    grid = make_grid(128, 128, num_levels=1)
    tiny = Boxes(torch.tensor([[64.2, 63.9, 64.3, 64.0]]))  # inside many anchors: equal IoUs
    assignment = ATSSAssigner(min_positives_per_gt=1)(grid, [tiny])
    (anchor,) = assignment.anchor_idxs[assignment.is_positive].tolist()
    distances = (box_centers(grid.boxes[0].tensor) - box_centers(tiny.tensor)).norm(dim=1)
    assert distances[anchor] == distances.min()
