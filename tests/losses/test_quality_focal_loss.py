"""Quality focal loss against dense autograd; the settings of `DenseLoss` that go with it."""

import pytest
import torch
from atss.anchor_grid import AnchorGrid
from atss.assigners import ATSSAssigner
from atss.box_regression import Box2BoxTransform
from atss.geometry import elementwise_iou
from atss.losses import DenseLoss, FocalLoss, QualityFocalLoss
from atss.losses import background as module
from atss.predictions import DensePredictions, Places, PredictionsAt, flatten_levels
from atss.targets import label_anchors
from conftest import boxes_of, labels_of, make_grid, make_instances, random_boxes
from reference_predictions import dense_losses, soft_class_loss

SIZES = ((4, 6), (2, 3), (1, 1))  # rows, columns of three levels
NUM_IMAGES, NUM_CLASSES = 2, 5


class Case:
    """Logits of three levels, and samples: some positive, some not, an anchor in two of them."""

    def __init__(self, num_cells, ignored):
        channels = num_cells * NUM_CLASSES
        self.num_cells = num_cells
        self.logits = [2 * torch.randn(NUM_IMAGES, channels, *size) for size in SIZES]
        cells = [torch.tensor([[-4.0, -4.0, 4.0, 4.0]] * num_cells)] * len(SIZES)
        grid = AnchorGrid(SIZES, (8, 16, 32), cells)
        num_anchors = grid.num_anchors
        positive = torch.rand(NUM_IMAGES, num_anchors) < 0.2
        self.is_ignored = (torch.rand(positive.shape) < 0.2) & ~positive if ignored else None
        images, idxs = (positive | (torch.rand(positive.shape) < 0.2)).nonzero().unbind(dim=1)
        is_positive = positive[images, idxs]
        self.is_positive = torch.cat((is_positive, torch.zeros_like(is_positive)))
        self.images, self.idxs = images.repeat(2), idxs.repeat(2)
        self.places = Places.of(grid, self.images, self.idxs)
        self.classes = torch.randint(NUM_CLASSES, self.idxs.shape)
        self.targets = torch.rand(self.idxs.shape)
        self.targets[:4] = torch.tensor([0.0, 1.0, 1.0, 0.0])

    def loss(self, logits, beta):
        return QualityFocalLoss(beta)(
            logits, self.places, self.classes, self.targets, self.is_positive, self.num_cells,
            self.is_ignored,
        )  # fmt: skip

    def dense_loss(self, logits, beta):
        flat = flatten_levels([level.double() for level in logits], self.num_cells)  # (N, R, K)
        targets, kept = torch.zeros_like(flat), self.is_positive
        places = self.images[kept], self.idxs[kept], self.classes[kept]
        targets[places] = self.targets[kept].double()
        losses = soft_class_loss(flat, targets, beta)
        return losses.sum() if self.is_ignored is None else losses[~self.is_ignored].sum()


def value_and_gradient(loss, logits):
    value = loss(*logits)
    return value, torch.autograd.grad(3 * value, logits)  # 3, as normalisation brings a factor


@pytest.mark.parametrize("num_cells", [1, 3])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("way", ["plain", "small blocks", "beta 1.5", "bfloat16", "compiled"])
def test_value_and_gradient_are_those_of_dense_autograd(
    monkeypatch, num_cells, ignored, memory_format, way
):
    monkeypatch.setattr(module, "_BLOCK", 8 if way == "small blocks" else 1 << 17)
    beta, dtype = 1.5 if way == "beta 1.5" else 2.0, torch.float32
    case = Case(num_cells, ignored)
    loss = lambda *levels: case.loss(levels, beta)  # noqa: E731
    if way == "bfloat16":
        dtype = torch.bfloat16
    elif way == "compiled":
        torch._dynamo.reset()
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    logits = [x.detach().to(dtype, memory_format=memory_format) for x in case.logits]
    value, grads = value_and_gradient(loss, [x.requires_grad_() for x in logits])
    dense = [x.detach().float().requires_grad_() for x in logits]
    expected, expected_grads = value_and_gradient(lambda *x: case.dense_loss(x, beta), dense)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    rtol, atol = (1e-2, 1e-3) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    for gradient, other in zip(grads, expected_grads):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), other, rtol=rtol, atol=atol)


def test_extreme_logits_and_met_targets_have_finite_gradients():
    x = torch.tensor([-300.0, -60.0, 0.0, 0.0, 60.0, 300.0], requires_grad=True)
    y = torch.tensor([1.0, 0.0, 0.5, 0.2, 1.0, 0.0])
    for beta in (0.5, 1.0, 2.0):
        losses = QualityFocalLoss(beta).positive_term(x, y)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        assert losses.isfinite().all() and gradient.isfinite().all()
        assert losses[2].item() == pytest.approx(0, abs=1e-15)  # p = y


class Batch:
    """Two images, three classes: predictions with gradients, targets by ATSS."""

    def __init__(self, with_quality):
        self.grid = make_grid(64, 96, num_levels=3)
        self.transform = Box2BoxTransform()

        def maps(channels):
            sizes = self.grid.grid_sizes
            return [(0.7 * torch.randn(2, channels, *s)).requires_grad_() for s in sizes]

        self.predictions = DensePredictions(maps(3), maps(4), maps(1) if with_quality else None, 1)
        boxes = random_boxes(4, 64, 96), random_boxes(2, 64, 96)
        instances = [make_instances(b, torch.randint(3, (len(b),))) for b in boxes]
        self.targets = label_anchors(ATSSAssigner(), self.grid, instances, 3)

    def losses(self, classification, **settings):
        loss = DenseLoss(self.transform, 3, classification, **settings)
        return loss(self.predictions, self.grid, self.targets)

    def losses_by_loops(self, class_loss, **settings):
        anchors = torch.cat([level.tensor for level in self.grid.boxes])
        maps = self.predictions.map(torch.Tensor.detach)
        deltas, quality = flatten_levels(maps.deltas, 1), None
        boxes = torch.stack([self.transform.apply_deltas(image, anchors) for image in deltas])
        if maps.quality is not None:
            quality = flatten_levels(maps.quality, 1).squeeze(2).numpy()
        arrays = (
            anchors, boxes, flatten_levels(maps.logits, 1), labels_of(self.targets, 3),
            boxes_of(self.targets),
        )  # fmt: skip
        return dense_losses(*(x.numpy() for x in arrays), class_loss, quality, **settings)


@pytest.mark.parametrize("classification", [FocalLoss(), QualityFocalLoss()])
@pytest.mark.parametrize("quality", [None, "centerness", "iou"])
@pytest.mark.parametrize("box_weighting", ["quality", "score", "iou", None])
@pytest.mark.parametrize("class_normalizer", ["positives", "targets"])
def test_losses_agree_with_loops_over_all_anchors(
    classification, quality, box_weighting, class_normalizer
):
    batch = Batch(with_quality=quality is not None)
    settings = dict(quality=quality, box_weighting=box_weighting, class_normalizer=class_normalizer)
    losses = batch.losses(classification, **settings)
    kind = "quality" if isinstance(classification, QualityFocalLoss) else "focal"
    expected = batch.losses_by_loops(kind, **settings)
    assert {name: x.item() for name, x in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_class_targets_and_box_weights_have_no_gradient():
    batch, qfl = Batch(with_quality=False), QualityFocalLoss()
    deltas, logits = batch.predictions.deltas, batch.predictions.logits
    losses = batch.losses(qfl, quality=None, box_weighting="score", class_normalizer="targets")
    for value, maps in ((losses["loss_cls"], deltas), (losses["loss_box_reg"], logits)):
        grads = torch.autograd.grad(value, maps, allow_unused=True, retain_graph=True)
        assert all(gradient is None or (gradient == 0).all() for gradient in grads)

    weighted = batch.losses(qfl, quality=None, box_weighting="iou")["loss_box_reg"]
    # The same weights from outside, as an assignment may bring them.
    assignment = batch.targets.assignment
    at = PredictionsAt(batch.predictions, batch.grid, batch.transform)
    boxes = at.boxes(assignment.image_idxs, assignment.anchor_idxs)
    assignment.box_weights = elementwise_iou(boxes, batch.targets.boxes)
    given = batch.losses(qfl, quality=None, box_weighting=None)["loss_box_reg"]
    torch.testing.assert_close(given, weighted)
    grads = (torch.autograd.grad(value, deltas) for value in (given, weighted))
    for gradient, other in zip(*grads):
        torch.testing.assert_close(gradient, other)
