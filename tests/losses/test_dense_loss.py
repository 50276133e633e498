"""The loss of a dense detector: values, gradients, normalisation, edges."""

import dataclasses

import pytest
import torch
from atss.assigners import ATSSAssigner
from atss.box_regression import Box2BoxTransform
from atss.geometry import elementwise_iou
from atss.losses import DenseLoss, FocalLoss, QualityFocalLoss
from atss.losses.boxes import elementwise_giou_loss
from atss.predictions import DensePredictions, Places, PredictionsAt, flatten_levels
from atss.targets import centerness_targets, label_anchors
from conftest import (
    boxes_of,
    feature_maps,
    golden_cases,
    golden_grid,
    grown,
    labels_of,
    make_grid,
    make_input,
    make_instances,
    random_boxes,
    random_predictions,
    targets_of_anchors,
    tiny_detector,
)
from reference import centerness, focal_loss, giou
from reference_predictions import dense_losses
from torch.utils._python_dispatch import TorchDispatchMode

from detectron2.structures import ImageList

TRANSFORM = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))


class Batch:
    """Predictions with gradients of images with so many objects each, and their targets by ATSS."""

    def __init__(self, *counts, size=(64, 96), num_classes=3, with_quality=True):
        self.grid, self.num_classes = make_grid(*size), num_classes
        predictions = random_predictions(
            self.grid.grid_sizes, len(counts), num_classes, with_quality=with_quality
        )
        self.predictions = predictions.map(torch.Tensor.requires_grad_)
        self.instances = [
            make_instances(random_boxes(n, *size), torch.randint(num_classes, (n,))) for n in counts
        ]
        self.targets = label_anchors(ATSSAssigner(), self.grid, self.instances, num_classes)

    def losses(self, **settings):
        loss = DenseLoss(TRANSFORM, self.num_classes, **settings)
        return loss(self.predictions, self.grid, self.targets)

    def losses_by_loops(self, **settings):
        maps = self.predictions.map(torch.Tensor.detach)
        anchors = torch.cat([level.tensor for level in self.grid.boxes])
        deltas, quality = flatten_levels(maps.deltas, 1), None
        boxes = torch.stack([TRANSFORM.apply_deltas(image, anchors) for image in deltas])
        if maps.quality is not None:
            quality = flatten_levels(maps.quality, 1).squeeze(2).numpy()
        arrays = (
            anchors, boxes, flatten_levels(maps.logits, 1),
            labels_of(self.targets, self.num_classes), boxes_of(self.targets),
        )  # fmt: skip
        return dense_losses(*(x.numpy() for x in arrays), quality_logits=quality, **settings)


class LegacyTransform:
    """Decodes in the authors' inclusive pixels from our grown anchors; for golden data only."""

    def __init__(self, kind):
        self.kind = kind

    def apply_deltas(self, deltas, boxes):
        if self.kind == "BOX":
            half = torch.tensor([0.5, 0.5, -0.5, -0.5])
            return TRANSFORM.apply_deltas(deltas, boxes) + half
        # Without the ReLU, which the release has in its head: its data are distances after it.
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        distances = deltas * (boxes[:, 2:3] - boxes[:, :1]) / 8
        return torch.cat((centers - distances[:, :2], centers + distances[:, 2:]), dim=1)


@pytest.mark.parametrize("case, fields", golden_cases("losses"), ids=lambda v: v.get("name", ""))
def test_losses_and_gradients_are_those_of_the_authors_release(case, fields):
    grid = golden_grid(fields)
    maps = {
        name: [
            fields[f"{name}{level}"].clone().requires_grad_()
            for level in range(len(grid.grid_sizes))
        ]
        for name in ("cls", "reg", "ctr")
    }
    gt_index = [fields[f"gt_index{i}"].long() for i in range(2)]
    labels, boxes = [], []
    for i, index in enumerate(gt_index):
        classes = fields[f"gt_labels{i}"][index.clamp(min=0)] - 1
        labels.append(torch.where(index >= 0, classes, torch.tensor(case["num_classes"])))
        # Centerness and GIoU of the release work on the boxes as they are, not grown.
        boxes.append(fields[f"gt_boxes{i}"][index.clamp(min=0)])
    targets = targets_of_anchors(torch.stack(labels), torch.stack(boxes), case["num_classes"])
    loss = DenseLoss(
        LegacyTransform(case["regression_type"]),
        case["num_classes"],
        box_loss_weight=case["reg_loss_weight"],
    )
    predictions = DensePredictions(maps["cls"], maps["reg"], maps["ctr"], grid.num_cell_anchors)
    losses = loss(predictions, grid, targets)
    for name, value in losses.items():
        expected = fields[name.replace("_box_reg", "_reg")]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    sum(losses.values()).backward()
    for name, tensors in maps.items():
        for level, tensor in enumerate(tensors):
            expected = fields[f"grad_{name}{level}"]
            torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-6)


def test_parts_of_the_loss_are_those_of_the_authors_release():
    for case, fields in golden_cases("loss_parts"):
        if case["name"].startswith("focal"):
            logits = fields["logits"].requires_grad_()
            targets = fields["targets"].long()  # 1..K, 0 background, -1 ignored
            num_rows, num_classes = logits.shape
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
            torch.testing.assert_close(total, fields["loss_sum"], rtol=1e-5, atol=0)
            total.backward()
            torch.testing.assert_close(logits.grad, fields["grad"], rtol=0, atol=1e-6)
            continue
        kind = case["regression_type"]
        anchors, preds = grown(fields["anchors"]), fields["preds"].requires_grad_()
        decoded = LegacyTransform(kind).apply_deltas(preds, anchors)
        gt_boxes = LegacyTransform(kind).apply_deltas(fields["targets"], anchors)
        losses = elementwise_giou_loss(decoded, gt_boxes)
        torch.testing.assert_close(losses, fields["loss"], rtol=1e-5, atol=1e-6)
        losses.sum().backward()
        torch.testing.assert_close(preds.grad, fields["grad"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("classification", [FocalLoss(), QualityFocalLoss()])
@pytest.mark.parametrize("quality", [None, "centerness", "iou", "no branch"])
@pytest.mark.parametrize("box_weighting", ["quality", "score", "iou", None])
@pytest.mark.parametrize("class_normalizer", ["positives", "targets"])
def test_losses_agree_with_loops_over_all_anchors(
    classification, quality, box_weighting, class_normalizer
):
    has_branch = quality in ("centerness", "iou")
    batch = Batch(4, 2, with_quality=has_branch)
    settings = dict(box_weighting=box_weighting, class_normalizer=class_normalizer)
    settings["quality"] = "centerness" if quality == "no branch" else quality
    losses = batch.losses(classification=classification, **settings)
    kind = "quality" if classification.uses_ious else "focal"
    expected = batch.losses_by_loops(class_loss=kind, **settings)
    assert {name: x.item() for name, x in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert (batch.targets.assignment.match_labels == 1).sum() > 5


def test_class_targets_and_box_weights_have_no_gradient():
    batch, qfl = Batch(4, 2, with_quality=False), QualityFocalLoss()
    deltas, logits = batch.predictions.deltas, batch.predictions.logits
    losses = batch.losses(classification=qfl, box_weighting="score", class_normalizer="targets")
    for value, maps in ((losses["loss_cls"], deltas), (losses["loss_box_reg"], logits)):
        grads = torch.autograd.grad(value, maps, allow_unused=True, retain_graph=True)
        assert all(gradient is None or (gradient == 0).all() for gradient in grads)

    weighted = batch.losses(box_weighting="iou")["loss_box_reg"]
    # The same weights from outside, as an assignment may bring them.
    assignment = batch.targets.assignment
    at = PredictionsAt(batch.predictions, batch.grid, TRANSFORM)
    boxes = at.boxes(assignment.image_idxs, assignment.anchor_idxs)
    assignment.box_weights = elementwise_iou(boxes, batch.targets.boxes)
    given = batch.losses(box_weighting=None)["loss_box_reg"]
    torch.testing.assert_close(given, weighted)
    grads = (torch.autograd.grad(value, deltas) for value in (given, weighted))
    for gradient, other in zip(*grads):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize(
    "settings", [dict(box_loss="giou"), dict(box_loss="smooth_l1"), dict(box_weighting="score")]
)
@pytest.mark.parametrize("with_quality", [True, False])
def test_samples_of_few_and_of_all_anchors_give_the_same_losses(settings, with_quality):
    batch = Batch(5, 0, with_quality=with_quality)
    labels = labels_of(batch.targets, 3)
    assert (labels < 3).sum() > 5
    losses = []
    for targets in (batch.targets, targets_of_anchors(labels, boxes_of(batch.targets), 3)):
        batch.targets = targets
        losses.append(batch.losses(**settings))
    maps = batch.predictions.all_maps
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(sum(x.values()), maps) for x in losses))


def test_sums_are_divided_by_no_less_than_one_positive_and_the_sum_of_centerness():
    grid = make_grid(64, 64, num_levels=1)
    predictions = random_predictions(grid.grid_sizes, 1, 2)
    loss = DenseLoss(TRANSFORM, 2)
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
    decoded = TRANSFORM.apply_deltas(delta, anchor)[0].tolist()
    found = loss(predictions, grid, targets)["loss_box_reg"].item()
    assert found == pytest.approx(2 * (1 - giou(decoded, box.tolist())), rel=1e-4)


@pytest.mark.parametrize("box_loss", ["giou", "smooth_l1"])
def test_batch_without_objects_has_finite_losses_and_zero_box_gradients(box_loss):
    batch = Batch(0, 0)
    losses = batch.losses(box_loss=box_loss)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert losses["loss_box_reg"] == 0 and losses["loss_centerness"] == 0
    for level in (*batch.predictions.deltas, *batch.predictions.quality):
        assert (level.grad == 0).all()
    assert all(level.grad.isfinite().all() for level in batch.predictions.logits)


def test_losses_are_float32_and_finite_from_bfloat16_predictions():
    batch = Batch(3)
    expected = batch.losses()
    batch.predictions = batch.predictions.map(torch.Tensor.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        losses = batch.losses()
    # `assert_close` compares types as well.
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=1e-2)


class ForbidWaiting(TorchDispatchMode):
    """Operators whose result has to come to the host, or whose size depends on values."""

    FORBIDDEN = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "item", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the GPU"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} with a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("box_loss, box_offset", [("giou", 0.5), ("smooth_l1", 0.0)])
def test_training_step_of_the_dense_core_never_waits_for_the_gpu(box_loss, box_offset):
    # Without the backbone's side: Detectron2's ImageList makes its sizes as tensors on the host.
    core = tiny_detector(box_offset=box_offset, loss=dict(box_loss=box_loss)).proposal_generator
    features = dict(zip(core.in_features, feature_maps(64, 96, 2, 64)))
    images = ImageList(torch.zeros(2, 3, 64, 96), [(64, 96), (64, 64)])
    gt_instances = [make_instances([[8, 8, 60, 50]], [1]), make_instances([], [])]
    with ForbidWaiting():
        _, losses = core(images, features, gt_instances)
        sum(losses.values()).backward()
    with pytest.raises(AssertionError, match="waits"), ForbidWaiting():
        losses["loss_cls"].item()  # the guard works


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
    batch = Batch(5, 0, 3, num_classes=4)
    targets = label_anchors(ATSSAssigner(), batch.grid, batch.instances, num_classes)
    labels, boxes = labels_of(targets, num_classes), boxes_of(targets)
    matched_idxs, match_labels = targets.assignment.matched_idxs, targets.assignment.match_labels
    assert (match_labels == 1).sum() > 10
    for image, anchor in (match_labels == 1).nonzero().tolist():
        g, instances = matched_idxs[image, anchor], batch.instances[image]
        assert labels[image, anchor] == (instances.gt_classes[g] if num_classes > 1 else 0)
        assert torch.equal(boxes[image, anchor], instances.gt_boxes.tensor[g])
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
    settings = {"box2box_transform": TRANSFORM, "num_classes": 3, **changes}
    with pytest.raises(ValueError, match=words):
        DenseLoss(**settings)


@pytest.mark.parametrize("output, channels", [("deltas", 68), ("logits", 4), ("quality", 2)])
def test_maps_with_more_channels_than_anchors_ask_for_are_refused(output, channels):
    batch = Batch(3)
    odd = [torch.zeros(1, channels, *size) for size in batch.grid.grid_sizes]
    batch.predictions = dataclasses.replace(batch.predictions, **{output: odd})
    with pytest.raises(ValueError, match=f"{output} have {channels} channels.*A = 1.*extra"):
        batch.losses()


def test_maps_of_another_size_than_the_grid_are_refused():
    batch = Batch(3)
    batch.grid = make_grid(64, 64)
    with pytest.raises(ValueError, match=r"predicts for 1 anchors at .*\(8, 12\).*\(8, 8\)"):
        batch.losses()


def test_quality_branch_that_nothing_would_train_is_refused():
    with pytest.raises(ValueError, match="quality=None.*quality branch"):
        Batch(3).losses(quality=None)


def test_sums_over_classes_are_those_of_all_logits():
    batch = Batch(0, 0)
    at = PredictionsAt(batch.predictions, batch.grid, TRANSFORM)
    expected = flatten_levels(batch.predictions.logits, 1).exp().sum(dim=2)
    torch.testing.assert_close(at.sum_over_classes(torch.exp), expected.detach())
