"""Focal, GIoU and centerness losses: values, gradients, normalisation, edges."""

import dataclasses

import numpy as np
import pytest
import torch
from atss.assigners import ATSSAssigner
from atss.box_regression import Box2BoxTransform
from atss.losses import DenseLoss, FocalLoss, QualityFocalLoss
from atss.losses.boxes import elementwise_giou_loss
from atss.predictions import DensePredictions, Places, PredictionsAt, flatten_levels
from atss.targets import centerness_targets, label_anchors
from conftest import (
    STRIDES,
    boxes_of,
    golden_cases,
    golden_grid,
    grown,
    labels_of,
    make_grid,
    make_input,
    make_instances,
    random_boxes,
    targets_of_anchors,
    tiny_detector,
)
from reference import binary_cross_entropy, centerness, focal_loss, giou
from torch.utils._python_dispatch import TorchDispatchMode

from detectron2.structures import ImageList

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_predictions(grid, num_images, num_classes, requires_grad=False):
    def maps(channels):
        tensors = [0.5 * torch.randn(num_images, channels, h, w) for h, w in grid.grid_sizes]
        return [t.requires_grad_(requires_grad) for t in tensors]

    num_cells = grid.num_cell_anchors
    return DensePredictions(
        maps(num_cells * num_classes), maps(num_cells * 4), maps(num_cells), num_cells
    )


def without_quality(predictions):
    return dataclasses.replace(predictions, quality=None)


def make_targets(grid, batch, num_classes, assigner=None):
    instances = [
        make_instances(boxes, torch.randint(num_classes, (len(boxes),))) for boxes in batch
    ]
    return label_anchors(assigner or ATSSAssigner(), grid, instances, num_classes)


class LegacyTransform:
    """Decodes in the authors' inclusive pixels from our grown anchors; for golden data only."""

    def __init__(self, kind):
        self.kind = kind

    def apply_deltas(self, deltas, boxes):
        if self.kind == "BOX":
            half = torch.tensor([0.5, 0.5, -0.5, -0.5])
            return Box2BoxTransform(WEIGHTS).apply_deltas(deltas, boxes) + half
        # Without the ReLU, which the release has in its head: its data are distances after it.
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        distances = deltas * (boxes[:, 2:3] - boxes[:, :1]) / 8
        return torch.cat((centers - distances[:, :2], centers + distances[:, 2:]), dim=1)


@pytest.mark.parametrize("case, fields", golden_cases("losses"), ids=lambda v: v.get("name", ""))
def test_losses_and_gradients_are_those_of_the_authors_release(case, fields):
    grid = golden_grid(fields)
    maps = {
        name: [
            torch.tensor(fields[f"{name}{level}"], requires_grad=True)
            for level in range(len(grid.grid_sizes))
        ]
        for name in ("cls", "reg", "ctr")
    }
    gt_index = [torch.as_tensor(fields[f"gt_index{i}"]).long() for i in range(2)]
    labels, boxes = [], []
    for i, index in enumerate(gt_index):
        classes = torch.as_tensor(fields[f"gt_labels{i}"])[index.clamp(min=0)] - 1
        labels.append(torch.where(index >= 0, classes, torch.tensor(case["num_classes"])))
        # Centerness and GIoU of the release work on the boxes as they are, not grown.
        boxes.append(torch.as_tensor(fields[f"gt_boxes{i}"])[index.clamp(min=0)])
    targets = targets_of_anchors(torch.stack(labels), torch.stack(boxes), case["num_classes"])
    loss = DenseLoss(
        LegacyTransform(case["regression_type"]),
        case["num_classes"],
        box_loss_weight=case["reg_loss_weight"],
    )
    predictions = DensePredictions(maps["cls"], maps["reg"], maps["ctr"], grid.num_cell_anchors)
    losses = loss(predictions, grid, targets)
    for ours, theirs in (
        ("loss_cls", "loss_cls"),
        ("loss_box_reg", "loss_reg"),
        ("loss_centerness", "loss_centerness"),
    ):
        expected = torch.as_tensor(fields[theirs])
        torch.testing.assert_close(losses[ours], expected, rtol=1e-5, atol=0)
    sum(losses.values()).backward()
    for name, tensors in maps.items():
        for level, tensor in enumerate(tensors):
            expected = torch.as_tensor(fields[f"grad_{name}{level}"])
            torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-6)


def test_parts_of_the_loss_are_those_of_the_authors_release():
    for case, fields in golden_cases("loss_parts"):
        if case["name"].startswith("focal"):
            logits = torch.tensor(fields["logits"])
            targets = torch.as_tensor(fields["targets"]).long()  # 1..K, 0 background, -1 ignored
            num_rows, num_classes = logits.shape
            logits.requires_grad_()
            labels = torch.where(targets == 0, num_classes, targets.clamp(min=0) - 1)
            images = torch.arange(num_rows)
            places = Places.of(make_grid(8, 8, num_levels=1), images, torch.zeros_like(images))
            total = FocalLoss()(
                [logits.view(num_rows, num_classes, 1, 1)],
                places,
                labels.clamp(0, num_classes - 1),
                torch.ones(num_rows),
                (labels >= 0) & (labels < num_classes),
                1,
                (labels < 0).view(-1, 1),
            )
            torch.testing.assert_close(
                total, torch.as_tensor(fields["loss_sum"]), rtol=1e-5, atol=0
            )
            total.backward()
            torch.testing.assert_close(
                logits.grad, torch.as_tensor(fields["grad"]), rtol=0, atol=1e-6
            )
            continue
        kind = case["regression_type"]
        anchors, preds = grown(fields["anchors"]), torch.tensor(fields["preds"])
        preds.requires_grad_()
        decoded = LegacyTransform(kind).apply_deltas(preds, anchors)
        gt_boxes = LegacyTransform(kind).apply_deltas(torch.as_tensor(fields["targets"]), anchors)
        losses = elementwise_giou_loss(decoded, gt_boxes)
        torch.testing.assert_close(losses, torch.as_tensor(fields["loss"]), rtol=1e-5, atol=1e-6)
        losses.sum().backward()
        torch.testing.assert_close(preds.grad, torch.as_tensor(fields["grad"]), rtol=0, atol=1e-5)


def test_losses_agree_with_loops_over_all_anchors():
    grid = make_grid(64, 96)
    num_classes = 3
    predictions = random_predictions(grid, 2, num_classes)
    targets = make_targets(grid, [random_boxes(4, 64, 96), random_boxes(2, 64, 96)], num_classes)
    transform = Box2BoxTransform(WEIGHTS)
    losses = DenseLoss(transform, num_classes)(predictions, grid, targets)

    anchors = torch.cat([b.tensor for b in grid.boxes])
    logits, deltas, ctr = (
        flatten_levels(maps, 1)
        for maps in (predictions.logits, predictions.deltas, predictions.quality)
    )
    labels, boxes = labels_of(targets, num_classes), boxes_of(targets)
    total_cls = total_box = total_ctr = center_sum = 0.0
    num_positives = 0
    for image in range(2):
        decoded = transform.apply_deltas(deltas[image], anchors)
        for r, label in enumerate(labels[image].tolist()):
            total_cls += sum(
                focal_loss(logits[image, r, k].item(), k == label) for k in range(num_classes)
            )
            if label == num_classes:
                continue
            num_positives += 1
            box = boxes[image, r].tolist()
            weight = centerness(anchors[r].tolist(), box)
            center_sum += weight
            total_box += weight * (1 - giou(decoded[r].tolist(), box))
            total_ctr += binary_cross_entropy(ctr[image, r, 0].item(), weight)
    assert num_positives > 5
    expected = {
        "loss_cls": total_cls / num_positives,
        "loss_box_reg": 2 * total_box / center_sum,
        "loss_centerness": total_ctr / num_positives,
    }
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("box_loss", ["giou", "smooth_l1"])
@pytest.mark.parametrize("with_centerness", [True, False])
def test_samples_of_few_and_of_all_anchors_give_the_same_losses(box_loss, with_centerness):
    grid = make_grid(96, 96)
    targets = make_targets(grid, [random_boxes(5, 96, 96), torch.zeros(0, 4)], 4)
    labels = labels_of(targets, 4)
    assert ((labels >= 0) & (labels < 4)).sum() > 5
    dense = targets_of_anchors(labels, boxes_of(targets), 4)
    loss = DenseLoss(Box2BoxTransform(WEIGHTS), 4, box_loss=box_loss)
    predictions = random_predictions(grid, 2, 4, requires_grad=True)
    if not with_centerness:
        predictions = without_quality(predictions)
    both = []
    for kind in (targets, dense):
        losses = loss(predictions, grid, kind)
        both.append((losses, torch.autograd.grad(sum(losses.values()), predictions.all_maps)))
    for name in both[0][0]:
        torch.testing.assert_close(both[0][0][name], both[1][0][name])
    for first, second in zip(both[0][1], both[1][1]):
        torch.testing.assert_close(first, second)


def test_sums_are_divided_by_no_less_than_one_positive_and_the_sum_of_centerness():
    grid = make_grid(64, 64, num_levels=1)
    predictions = random_predictions(grid, 1, 2)
    loss = DenseLoss(Box2BoxTransform(WEIGHTS), 2)
    labels = torch.full((1, 64), 2)
    nothing = targets_of_anchors(labels, torch.zeros(1, 64, 4), 2)
    expected = sum(focal_loss(x, False) for x in predictions.logits[0].flatten().tolist())
    found = loss(predictions, grid, nothing)["loss_cls"].item()
    assert found == pytest.approx(expected, rel=1e-4)

    # One positive whose centre, (4, 4), lies near a corner of its object: centerness 1/1000.
    labels[0, 0] = 1
    box = torch.tensor([3.0, 3.0, 1004.0, 1004.0])
    targets = targets_of_anchors(labels, box.expand(1, 64, 4).clone(), 2)
    anchor, delta = grid.boxes[0].tensor[:1], predictions.deltas[0][0, :, 0, 0].view(1, 4)
    decoded = Box2BoxTransform(WEIGHTS).apply_deltas(delta, anchor)[0].tolist()
    found = loss(predictions, grid, targets)["loss_box_reg"].item()
    assert found == pytest.approx(2 * (1 - giou(decoded, box.tolist())), rel=1e-4)


def test_ignored_anchors_have_no_influence():
    grid = make_grid(64, 64, num_levels=1)
    labels = torch.full((1, 64), 2)
    labels[0, 5], labels[0, 7] = -1, 0
    boxes = torch.tensor([8.0, 8.0, 40.0, 40.0]).expand(1, 64, 4).clone()
    targets = targets_of_anchors(labels, boxes, 2)
    predictions = random_predictions(grid, 1, 2, requires_grad=True)
    losses = DenseLoss(Box2BoxTransform(WEIGHTS), 2)(predictions, grid, targets)
    sum(losses.values()).backward()
    gradient = predictions.logits[0].grad.flatten(2)[0]  # (K, Hi*Wi)
    assert (gradient[:, 5] == 0).all() and (gradient[:, 6] != 0).all()
    assert (predictions.deltas[0].grad.flatten(2)[0][:, 5] == 0).all()


def test_without_centerness_positives_count_alike():
    grid = make_grid(96, 96)
    targets = make_targets(grid, [random_boxes(5, 96, 96)], 4)
    predictions = without_quality(random_predictions(grid, 1, 4))
    losses = DenseLoss(Box2BoxTransform(WEIGHTS), 4)(predictions, grid, targets)
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    anchors = torch.cat([b.tensor for b in grid.boxes])
    positive = labels_of(targets, 4)[0] < 4
    boxes = Box2BoxTransform(WEIGHTS).apply_deltas(
        flatten_levels(predictions.deltas, 1)[0], anchors
    )
    gt_boxes = boxes_of(targets)[0]
    values = [
        1 - giou(boxes[i].tolist(), gt_boxes[i].tolist()) for i in positive.nonzero().flatten()
    ]
    assert losses["loss_box_reg"].item() == pytest.approx(2 * np.mean(values), rel=1e-4)


@pytest.mark.parametrize("box_loss", ["giou", "smooth_l1"])
def test_batch_without_objects_has_finite_losses_and_zero_box_gradients(box_loss):
    grid = make_grid(64, 64)
    targets = make_targets(grid, [torch.zeros(0, 4)] * 2, 3)
    predictions = random_predictions(grid, 2, 3, requires_grad=True)
    losses = DenseLoss(Box2BoxTransform(WEIGHTS), 3, box_loss=box_loss)(predictions, grid, targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert losses["loss_box_reg"] == 0 and losses["loss_centerness"] == 0
    assert all(t.grad is not None and t.grad.isfinite().all() for t in predictions.all_maps)


def test_losses_are_float32_and_finite_from_bfloat16_predictions():
    grid = make_grid(64, 64)
    targets = make_targets(grid, [random_boxes(3, 64, 64)], 3)
    full = random_predictions(grid, 1, 3)
    half = full.map(torch.Tensor.bfloat16)
    loss = DenseLoss(Box2BoxTransform(WEIGHTS), 3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss(half, grid, targets)
    for name, value in loss(full, grid, targets).items():
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], value, rtol=2e-2, atol=1e-2)


class ForbidWaiting(TorchDispatchMode):
    """Operators whose result has to come to the host, or whose size depends on values."""

    FORBIDDEN = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "item", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the GPU"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} with a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("box_loss", ["giou", "smooth_l1"])
def test_assignment_and_loss_never_wait_for_the_gpu(box_loss):
    grid = make_grid(64, 64)
    predictions = random_predictions(grid, 2, 3, requires_grad=True)
    instances = [make_instances(random_boxes(n, 64, 64), [1] * n) for n in (3, 0)]
    loss = DenseLoss(Box2BoxTransform(WEIGHTS), 3, box_loss=box_loss)
    with ForbidWaiting():
        targets = label_anchors(ATSSAssigner(), grid, instances, 3)
        sum(loss(predictions, grid, targets).values()).backward()
    with pytest.raises(AssertionError, match="waits"), ForbidWaiting():
        targets.classes.sum().item()  # the guard works


@pytest.mark.parametrize("box_offset", [0.0, 0.5])
def test_training_step_of_the_dense_core_never_waits_for_the_gpu(box_offset):
    # Without the backbone's side: Detectron2's ImageList makes its sizes as tensors on the host.
    model = tiny_detector(box_offset=box_offset).train()
    features = [torch.rand(2, 64, -(-64 // s), -(-96 // s)) for s in STRIDES]
    images = ImageList(torch.zeros(2, 3, 64, 96), [(64, 96), (64, 64)])
    gt_instances = [make_instances([[8, 8, 60, 50]], [1]), make_instances([], [])]
    with ForbidWaiting():
        _, losses = model.proposal_generator(
            images, dict(zip(model.proposal_generator.in_features, features)), gt_instances
        )
        sum(losses.values()).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_training_step_waits_on_a_gpu():
    model = tiny_detector(box_offset=0.5).train().cuda()
    batch = [make_input(64, 96, [[8, 8, 60, 50]], [1]), make_input(64, 64)]
    sum(model(batch).values()).backward()  # compiles the loss, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(model(batch).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_centerness_is_one_in_the_middle_and_zero_on_or_beyond_an_edge():
    anchors = torch.tensor([[8.0, 8, 24, 24], [-8, 8, 8, 24], [40, 40, 56, 56], [0, 0, 16, 16]])
    box = torch.tensor([0.0, 0.0, 32.0, 32.0])
    found = centerness_targets(anchors, box.expand(4, 4))
    # Last: centre (8, 8), l/r = 8/24 and t/b = 8/24, so sqrt(1/9).
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0, 1 / 3]))
    for anchor, value in zip(anchors.tolist(), found.tolist()):
        assert centerness(anchor, box.tolist()) == pytest.approx(value)
    assert centerness_targets(anchors[3:], torch.tensor([[8.0, 8.0, 8.0, 8.0]])) == 0


@pytest.mark.parametrize("num_classes", [1, 4])
def test_each_sample_learns_class_and_box_of_its_object(num_classes):
    grid = make_grid(96, 96)
    batch = [random_boxes(5, 96, 96), torch.zeros(0, 4), random_boxes(3, 96, 96)]
    instances = [make_instances(b, torch.randint(4, (len(b),))) for b in batch]
    targets = label_anchors(ATSSAssigner(), grid, instances, num_classes)
    labels, boxes = labels_of(targets, num_classes), boxes_of(targets)
    matched_idxs, match_labels = targets.assignment.matched_idxs, targets.assignment.match_labels
    assert (match_labels == 1).sum() > 10
    for image, anchor in (match_labels == 1).nonzero().tolist():
        g = matched_idxs[image, anchor]
        expected = instances[image].gt_classes[g] if num_classes > 1 else 0
        assert labels[image, anchor] == expected
        assert torch.equal(boxes[image, anchor], instances[image].gt_boxes.tensor[g])
    assert (labels[match_labels == 0] == num_classes).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"box_loss": "iou"}, r"box_loss.*giou.*smooth_l1.*got 'iou'.*model.loss.box_loss"),
        ({"quality": "ctr"}, r"quality.*centerness.*got 'ctr'"),
        ({"box_weighting": "area"}, "box_weighting.*score.*got 'area'"),
        ({"class_normalizer": "sum"}, "class_normalizer.*targets.*got 'sum'"),
        ({"num_classes": 0}, "num_classes"),
        ({"box_loss_weight": float("inf")}, "finite box_loss_weight >= 0, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    settings = {"box2box_transform": Box2BoxTransform(WEIGHTS), "num_classes": 3, **changes}
    with pytest.raises(ValueError, match=words):
        DenseLoss(**settings)


def test_class_loss_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\], got 1.5.*classification.alpha"):
        FocalLoss(alpha=1.5)
    with pytest.raises(ValueError, match="gamma >= 0, got -1"):
        FocalLoss(gamma=-1)
    with pytest.raises(ValueError, match="finite gamma >= 0, got inf.*classification.gamma"):
        FocalLoss(gamma=float("inf"))
    with pytest.raises(ValueError, match="beta >= 0, got -1"):
        QualityFocalLoss(beta=-1)


@pytest.mark.parametrize("output, channels", [("deltas", 68), ("logits", 4), ("quality", 2)])
def test_maps_with_more_channels_than_anchors_ask_for_are_refused(output, channels):
    grid = make_grid(64, 64)
    predictions = random_predictions(grid, 1, 3)
    odd = [torch.zeros(1, channels, *size) for size in grid.grid_sizes]
    predictions = dataclasses.replace(predictions, **{output: odd})
    targets = make_targets(grid, [random_boxes(3, 64, 64)], 3)
    with pytest.raises(ValueError, match=f"{output} have {channels} channels.*A = 1.*extra"):
        DenseLoss(Box2BoxTransform(WEIGHTS), 3)(predictions, grid, targets)


def test_maps_of_another_size_than_the_grid_are_refused():
    grid, other = make_grid(64, 64), make_grid(64, 96)
    targets = make_targets(grid, [random_boxes(3, 64, 64)], 3)
    with pytest.raises(ValueError, match=r"predicts for 1 anchors at .*\(8, 12\).*\(8, 8\)"):
        DenseLoss(Box2BoxTransform(WEIGHTS), 3)(random_predictions(other, 1, 3), grid, targets)


def test_sums_over_classes_are_those_of_all_logits():
    grid = make_grid(64, 96)
    predictions = random_predictions(grid, 2, 3)
    at = PredictionsAt(predictions, grid, Box2BoxTransform(WEIGHTS))
    expected = flatten_levels(predictions.logits, 1).exp().sum(dim=2)
    torch.testing.assert_close(at.sum_over_classes(torch.exp), expected)


def test_quality_branch_that_nothing_would_train_is_refused():
    grid = make_grid(64, 64)
    targets = make_targets(grid, [random_boxes(3, 64, 64)], 3)
    loss = DenseLoss(Box2BoxTransform(WEIGHTS), 3, quality=None)
    with pytest.raises(ValueError, match="quality=None.*quality branch"):
        loss(random_predictions(grid, 1, 3), grid, targets)
