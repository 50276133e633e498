"""The streamed class losses: against dense autograd in every memory layout, dtype and way."""

import itertools

import pytest
import torch
from atss.anchor_grid import AnchorGrid
from atss.losses import FocalLoss, QualityFocalLoss, background, classification
from atss.predictions import Places, flatten_levels, read_maps
from reference_predictions import soft_class_loss

SIZES = ((4, 6), (2, 3), (1, 1))  # rows, columns of three levels
NUM_IMAGES, NUM_CLASSES = 2, 5


class Case:
    """Logits of three levels, and samples of them with random soft targets.

    Samples are all positives and some others, twice, the second time not positive: as rules with
    few candidates have them. With `dense`, every anchor is one sample.
    """

    def __init__(self, num_cells=1, ignored=False, dense=False):
        self.num_cells = num_cells
        channels = num_cells * NUM_CLASSES
        maps = [2 * torch.randn(NUM_IMAGES, channels, *size) for size in SIZES]
        self.logits = [level.requires_grad_() for level in maps]
        cells = [torch.tensor([[-4.0, -4.0, 4.0, 4.0]] * num_cells)] * len(SIZES)
        grid = AnchorGrid(SIZES, (8, 16, 32), cells)
        positive = torch.rand(NUM_IMAGES, grid.num_anchors) < 0.2
        self.is_ignored = (torch.rand(positive.shape) < 0.2) & ~positive if ignored else None
        others = torch.rand(positive.shape) < (1 if dense else 0.2)
        images, idxs = (positive | others).nonzero().unbind(dim=1)
        is_positive = positive[images, idxs]
        if not dense:
            images, idxs = images.repeat(2), idxs.repeat(2)
            is_positive = torch.cat((is_positive, torch.zeros_like(is_positive)))
        self.images, self.idxs, self.is_positive = images, idxs, is_positive
        self.places = Places.of(grid, images, idxs)
        self.classes = torch.randint(NUM_CLASSES, idxs.shape)
        self.targets = torch.rand(idxs.shape)
        self.targets[:4] = torch.tensor([0.0, 1.0, 1.0, 0.0])

    def loss(self, logits=None, loss=None):
        return (loss or FocalLoss())(
            logits or self.logits, self.places, self.classes, self.targets, self.is_positive,
            self.num_cells, self.is_ignored,
        )  # fmt: skip

    def dense_loss(self, logits=None, loss=None):
        loss = loss or FocalLoss()
        logits = [level.double() for level in logits or self.logits]
        flat = flatten_levels(logits, self.num_cells)  # (N, R, K)
        targets, kept = torch.zeros_like(flat), self.is_positive
        places = self.images[kept], self.idxs[kept], self.classes[kept]
        targets[places] = self.targets[kept].double()
        losses = soft_class_loss(flat, targets, loss.gamma, getattr(loss, "alpha", None))
        return losses.sum() if self.is_ignored is None else losses[~self.is_ignored].sum()


def whole_levels(values, masks, grads, weight, gamma):
    """`sum_as_background` by the form for GPUs."""
    levels = [background.masked_view(x, mask) for x, mask in zip(values, masks)]
    views = [None if g is None else g[:-1].view(x.shape) for g, x in zip(grads, levels)]
    sums = [
        background.background_sum(x, mask, g, weight, gamma)
        for x, mask, g in zip(levels, masks, views)
    ]
    return torch.stack(sums).sum()


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
FOCAL, QUALITY = FocalLoss(), QualityFocalLoss()
LOSSES = [FOCAL, FocalLoss(0.6, 1.5), FocalLoss(0.5, 0.0), QUALITY, QualityFocalLoss(1.5)]
WAYS = ["small blocks", "all anchors", "whole levels", "bfloat16", "float16"]
CASES = [
    *itertools.product(LOSSES, LAYOUTS, ["plain"]),
    *itertools.product([FOCAL, QUALITY], LAYOUTS, WAYS),
    *[(FOCAL, "contiguous", "compiled"), (QUALITY, "channels last", "compiled")],  # a second each
]
TOLERANCES = {
    torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-2, 1e-3), torch.float16: (2e-3, 2e-4)
}  # fmt: skip


@pytest.mark.parametrize("num_cells", [1, 3])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("loss, layout, way", CASES)
def test_value_and_gradient_are_those_of_dense_autograd(
    monkeypatch, num_cells, ignored, loss, layout, way
):
    monkeypatch.setattr(background, "_BLOCK", 8 if way == "small blocks" else 1 << 17)
    if way == "whole levels":
        monkeypatch.setattr(classification, "sum_as_background", whole_levels)
    case = Case(num_cells, ignored, dense=way == "all anchors")
    dtype = getattr(torch, way) if "float16" in way else torch.float32

    def run(*levels):  # a factor, as normalisation and gradient scaling bring one to the backward
        return 3 * case.loss(levels, loss)

    if way == "compiled":
        torch._dynamo.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    logits = [LAYOUTS[layout](x.detach().to(dtype)).requires_grad_() for x in case.logits]
    value = run(*logits)
    dense = [x.detach().float().requires_grad_() for x in logits]
    expected = 3 * case.dense_loss(dense, loss)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    rtol, atol = TOLERANCES[dtype]
    gradients = torch.autograd.grad(value, logits), torch.autograd.grad(expected, dense)
    for gradient, other in zip(*gradients):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), other, rtol=rtol, atol=atol)


def test_large_infinite_and_missing_logits_show_in_the_value():
    case = Case(ignored=True)
    case.is_positive[:], case.is_ignored[:] = False, False
    logits = [level.detach() for level in case.logits]
    logits[0][0, 0, 0, 0] = 500.0
    assert case.loss(logits).item() == pytest.approx(case.dense_loss(logits).item(), rel=1e-5)
    for value in (float("inf"), float("nan")):
        logits[0][0, 0, 0, 0] = value
        assert not case.loss(logits).isfinite()
    case.is_ignored[0, 0] = True  # nothing there has any influence
    assert case.loss(logits).isfinite()


def test_background_logits_of_minus_infinity_add_nothing():
    case = Case()
    case.is_positive[:] = False
    logits = [level.detach() for level in case.logits]
    logits[0][:, :, 0, 0] = -float("inf")
    expected = case.dense_loss([level.clamp(min=-200) for level in logits])
    value = case.loss([level.requires_grad_() for level in logits])
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (logits[0].grad[:, :, 0, 0] == 0).all()


def test_extreme_logits_and_met_targets_have_finite_gradients():
    x = torch.tensor([-300.0, -60.0, 0.0, 0.0, 60.0, 300.0], requires_grad=True)
    y = torch.tensor([1.0, 0.0, 0.5, 0.2, 1.0, 0.0])
    for beta in (0.5, 1.0, 2.0):
        losses = QualityFocalLoss(beta).positive_term(x, y)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        assert losses.isfinite().all() and gradient.isfinite().all()
        assert losses[2].item() == pytest.approx(0, abs=1e-15)  # p = y


def test_autocast_does_not_touch_the_loss():
    case = Case()
    expected = case.loss()
    gradient = torch.autograd.grad(expected, case.logits)
    with torch.autocast("cpu", torch.bfloat16):
        value = case.loss()
    assert torch.equal(value, expected)
    assert all(map(torch.equal, torch.autograd.grad(value, case.logits), gradient))


def test_gradient_scaling_saves_small_gradients_in_float16():
    case = Case()
    case.is_positive[:] = False
    logits = [torch.full_like(x, -7.0, dtype=torch.float16).requires_grad_() for x in case.logits]
    scale = 2.0**16
    (case.loss(logits) * scale).backward()
    p = torch.tensor(-7.0, dtype=torch.float64).sigmoid()
    expected = 0.75 * p**2 * (2 * (1 - p) * -torch.log1p(-p) + p)  # 2e-9: 0 in float16
    for level in logits:
        torch.testing.assert_close(
            level.grad.double() / scale, expected.expand(level.shape), rtol=2e-2, atol=0
        )


def test_gradients_accumulate_over_two_backwards_of_one_graph():
    case = Case()
    value = case.loss()
    once = torch.autograd.grad(value, case.logits, retain_graph=True)
    value.backward(retain_graph=True)
    value.backward()
    for level, gradient in zip(case.logits, once):
        torch.testing.assert_close(level.grad, 2 * gradient)


def test_gradient_of_the_gradient_is_refused():
    case = Case()
    with pytest.raises(RuntimeError, match="differentiable once.*create_graph=False"):
        torch.autograd.grad(case.loss(), case.logits, create_graph=True)


def test_without_gradients_only_the_value_is_made():
    case = Case()
    with torch.no_grad():
        value = case.loss()
    assert not value.requires_grad
    torch.testing.assert_close(value, case.loss().detach())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_form_for_compilers_has_the_right_gradient_everywhere(gamma):
    x = torch.tensor([-300.0, -60.0, -3.0, 0.0, 3.0, 60.0, 300.0], requires_grad=True)
    (found,) = torch.autograd.grad(background.background_sum(x, None, None, 0.75, gamma), x)
    taken = torch.empty(len(x))
    background.background_sum(x.detach(), None, taken, 0.75, gamma)
    torch.testing.assert_close(found, taken, rtol=1e-5, atol=1e-7)
    p = x.detach().double().sigmoid()
    softplus = torch.nn.functional.softplus(x.detach().double())
    expected = 0.75 * p**gamma * (gamma * (1 - p) * softplus + p)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_value_is_float32_whatever_the_default():
    case = Case()
    torch.set_default_dtype(torch.float64)
    try:
        value = case.loss([level.detach() for level in case.logits])
    finally:
        torch.set_default_dtype(torch.float32)
    assert value.dtype == torch.float32


def test_values_are_taken_from_where_each_anchor_lies():
    case = Case(num_cells=3)
    found = read_maps(case.logits, case.places, case.num_cells)
    expected = flatten_levels(case.logits, case.num_cells)[case.images, case.idxs]
    assert torch.equal(found, expected)
    weights = torch.randn(found.shape)
    gradients = (torch.autograd.grad((x * weights).sum(), case.logits) for x in (found, expected))
    for gradient, other in zip(*gradients):
        torch.testing.assert_close(gradient, other)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\], got 1.5.*classification.alpha"):
        FocalLoss(alpha=1.5)
    with pytest.raises(ValueError, match="gamma >= 0, got -1"):
        FocalLoss(gamma=-1)
    with pytest.raises(ValueError, match="finite gamma >= 0, got inf.*classification.gamma"):
        FocalLoss(gamma=float("inf"))
    with pytest.raises(ValueError, match="beta >= 0, got -1"):
        QualityFocalLoss(beta=-1)
