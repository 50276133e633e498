"""The streamed class losses: against loops, in every memory layout, dtype and way of running."""

import pytest
import torch
from atss.anchor_grid import AnchorGrid
from atss.losses import FocalLoss, classification
from atss.losses import background as module
from atss.predictions import Places, read_maps
from reference import focal_loss

SIZES = ((4, 6), (2, 3), (1, 1))  # rows, columns of three levels
NUM_IMAGES = 2


def places_of(images, anchor_idxs, num_cells):
    cells = [torch.tensor([[-4.0, -4.0, 4.0, 4.0]] * num_cells)] * len(SIZES)
    return Places.of(AnchorGrid(SIZES, (8, 16, 32), cells), images, anchor_idxs)


def make_logits(num_cells=1, num_classes=5, scale=2.0):
    maps = [torch.randn(NUM_IMAGES, num_cells * num_classes, *size) * scale for size in SIZES]
    return [level.requires_grad_() for level in maps]


def make_labels(num_cells=1, num_classes=5, ignored=False):
    num_anchors = sum(h * w for h, w in SIZES) * num_cells
    labels = torch.randint(num_classes, (NUM_IMAGES, num_anchors))
    labels[torch.rand(labels.shape) < 0.8] = num_classes
    if ignored:
        labels[torch.rand(labels.shape) < 0.2] = -1
    return labels


def loss_of(logits, labels, num_cells=1, sparse=False, **settings):
    """With every anchor as a sample, or as rules with few candidates have them."""
    num_classes = logits[0].shape[1] // num_cells
    is_positive = (labels >= 0) & (labels < num_classes)
    samples = is_positive | (torch.arange(labels.shape[1]) % 7 == 0) if sparse else labels > -2
    images, anchor_idxs = samples.nonzero().unbind(dim=1)
    if sparse:  # a candidate of two objects: not positive the second time
        images, anchor_idxs = images.repeat(2), anchor_idxs.repeat(2)
    is_positive = is_positive[images, anchor_idxs]
    if sparse:
        is_positive[len(is_positive) // 2 :] = False
    places = places_of(images, anchor_idxs, num_cells)
    classes = labels[images, anchor_idxs].clamp(0, num_classes - 1)
    ignored = labels < 0 if (labels < 0).any() else None
    ones = torch.ones(classes.shape)
    loss = FocalLoss(**settings)
    return loss(logits, places, classes, ones, is_positive, num_cells, ignored)


def loss_by_loops(logits, labels, num_cells, alpha=0.25, gamma=2.0):
    total, first = 0.0, 0
    for level in logits:
        _, channels, height, width = level.shape
        num_classes = channels // num_cells
        for image in range(NUM_IMAGES):
            for row in range(height):
                for column in range(width):
                    for cell in range(num_cells):
                        anchor = first + (row * width + column) * num_cells + cell
                        label = int(labels[image, anchor])
                        for k in range(num_classes if label >= 0 else 0):
                            x = level[image, cell * num_classes + k, row, column].item()
                            total += focal_loss(x, k == label, alpha, gamma)
        first += height * width * num_cells
    return total


def plain_loss(logits, labels, num_cells, alpha=0.25, gamma=2.0):
    """Autograd's gradient, from the textbook form with a one-hot target."""
    flat = []
    for level in logits:
        n, channels, height, width = level.shape
        level = level.double().reshape(n, num_cells, channels // num_cells, height * width)
        flat.append(level.permute(0, 3, 1, 2).reshape(n, height * width * num_cells, -1))
    x = torch.cat(flat, dim=1)  # (N, R, K)
    target = (labels.unsqueeze(2) == torch.arange(x.shape[2])).double()
    p = x.sigmoid()
    p_t = p * target + (1 - p) * (1 - target)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(x, target, reduction="none")
    weight = alpha * target + (1 - alpha) * (1 - target)
    return (weight * (1 - p_t) ** gamma * bce * (labels >= 0).unsqueeze(2)).sum()


@pytest.mark.parametrize("num_cells", [1, 3])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 1.5), (0.5, 0.0)])
def test_value_is_that_of_loops_over_all_logits(num_cells, ignored, alpha, gamma):
    logits, labels = make_logits(num_cells), make_labels(num_cells, ignored=ignored)
    value = loss_of(logits, labels, num_cells, alpha=alpha, gamma=gamma)
    expected = loss_by_loops(logits, labels, num_cells, alpha, gamma)
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_cells", [1, 3])
@pytest.mark.parametrize("form", ["sparse", "dense", "ignored"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [8, 1 << 17])
def test_gradient_is_autograds_in_every_layout(monkeypatch, num_cells, form, memory_format, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    logits, labels = make_logits(num_cells), make_labels(num_cells, ignored=form == "ignored")
    maps = [level.contiguous(memory_format=memory_format) for level in logits]
    # A factor, as normalisation and gradient scaling bring one to the backward.
    (3 * loss_of(maps, labels, num_cells, sparse=form == "sparse")).backward()
    expected = torch.autograd.grad(3 * plain_loss(logits, labels, num_cells), logits)
    for level, gradient in zip(logits, expected):
        torch.testing.assert_close(level.grad, gradient.float(), rtol=1e-5, atol=1e-6)


def test_every_other_memory_layout_is_taken_as_well():
    logits, labels = make_logits(), make_labels()
    odd = [level.transpose(2, 3).contiguous().transpose(2, 3) for level in logits]
    torch.testing.assert_close(loss_of(odd, labels), loss_of(logits, labels))


def test_large_infinite_and_missing_logits_show_in_the_value():
    labels = make_labels()
    labels[:] = 5
    logits = [level.detach() for level in make_logits()]
    logits[0][0, 0, 0, 0] = 500.0
    expected = plain_loss(logits, labels, 1)
    assert loss_of(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    for value in (float("inf"), float("nan")):
        logits[0][0, 0, 0, 0] = value
        assert not loss_of(logits, labels).isfinite()
    labels[0, 0] = -1  # ignored: nothing there has any influence
    assert loss_of(logits, labels).isfinite()


def test_background_logits_of_minus_infinity_add_nothing():
    labels = make_labels()
    labels[:] = 5
    logits = [level.detach() for level in make_logits()]
    logits[0][:, :, 0, 0] = -float("inf")
    expected = plain_loss([level.clamp(min=-200) for level in logits], labels, 1)
    leaves = [level.requires_grad_() for level in logits]
    value = loss_of(leaves, labels)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (leaves[0].grad[:, :, 0, 0] == 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_logits_have_a_float32_value_and_gradients_of_their_own_type(
    dtype, tolerance
):
    logits, labels = make_logits(), make_labels()
    half = [level.detach().to(dtype).requires_grad_() for level in logits]
    value = loss_of(half, labels)
    value.backward()
    full = [level.detach().float().requires_grad_() for level in half]
    expected = plain_loss(full, labels, 1)
    expected.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for level, reference in zip(half, full):
        assert level.grad.dtype == dtype
        torch.testing.assert_close(
            level.grad.float(), reference.grad, rtol=tolerance, atol=tolerance * 0.1
        )


def test_autocast_does_not_touch_the_loss():
    logits, labels = make_logits(), make_labels()
    expected = loss_of(logits, labels)
    gradient = torch.autograd.grad(expected, logits)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss_of(logits, labels)
    assert torch.equal(value, expected)
    assert all(map(torch.equal, torch.autograd.grad(value, logits), gradient))


def test_gradient_scaling_saves_small_gradients_in_float16():
    labels = torch.full((NUM_IMAGES, sum(h * w for h, w in SIZES)), 5)
    logits = [torch.full((NUM_IMAGES, 5, *s), -7.0, dtype=torch.float16) for s in SIZES]
    logits = [level.requires_grad_() for level in logits]
    scale = 2.0**16
    (loss_of(logits, labels) * scale).backward()
    p = torch.tensor(-7.0, dtype=torch.float64).sigmoid()
    expected = 0.75 * p**2 * (2 * (1 - p) * -torch.log1p(-p) + p)  # 2e-9: 0 in float16
    for level in logits:
        torch.testing.assert_close(
            level.grad.double() / scale, expected.expand(level.shape), rtol=2e-2, atol=0
        )


def test_gradients_accumulate_over_two_backwards_of_one_graph():
    logits, labels = make_logits(), make_labels()
    value = loss_of(logits, labels)
    once = torch.autograd.grad(value, logits, retain_graph=True)
    value.backward(retain_graph=True)
    value.backward()
    for level, gradient in zip(logits, once):
        torch.testing.assert_close(level.grad, 2 * gradient)


def test_gradient_of_the_gradient_is_refused():
    logits, labels = make_logits(), make_labels()
    with pytest.raises(RuntimeError, match="differentiable once.*create_graph=False"):
        torch.autograd.grad(loss_of(logits, labels), logits, create_graph=True)


def test_without_gradients_only_the_value_is_made():
    logits, labels = make_logits(), make_labels()
    expected = loss_of(logits, labels)
    with torch.no_grad():
        value = loss_of(logits, labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach())


@pytest.mark.parametrize("ignored", [False, True])
def test_compiled_model_code_gives_the_same_value_and_gradient(ignored):
    logits, labels = make_logits(3), make_labels(3, ignored=ignored)
    is_positive = ((labels >= 0) & (labels < 5)).flatten()
    images, anchor_idxs = (labels > -2).nonzero().unbind(dim=1)
    places = places_of(images, anchor_idxs, 3)
    mask = labels < 0 if ignored else None
    classes = labels.flatten().clamp(0, 4)
    ones = torch.ones(classes.shape)

    def step(*levels):
        return 2 * FocalLoss()(levels, places, classes, ones, is_positive, 3, mask)

    expected = torch.autograd.grad(step(*logits), logits)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    value = compiled(*logits)
    torch.testing.assert_close(value, step(*logits))
    for found, gradient in zip(torch.autograd.grad(value, logits), expected):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_form_for_compilers_has_the_right_gradient_everywhere(gamma):
    x = torch.tensor([-300.0, -60.0, -3.0, 0.0, 3.0, 60.0, 300.0], requires_grad=True)
    (found,) = torch.autograd.grad(module.background_sum(x, None, None, 0.75, gamma), x)
    taken = torch.empty(len(x))
    module.background_sum(x.detach(), None, taken, 0.75, gamma)
    torch.testing.assert_close(found, taken, rtol=1e-5, atol=1e-7)
    p = x.detach().double().sigmoid()
    softplus = torch.nn.functional.softplus(x.detach().double())
    expected = 0.75 * p**gamma * (gamma * (1 - p) * softplus + p)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("default", [torch.float64, torch.float32])
def test_value_is_float32_whatever_the_default(default):
    labels = make_labels()
    logits = [level.detach() for level in make_logits()]
    torch.set_default_dtype(default)
    try:
        value = loss_of(logits, labels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("form", ["dense", "ignored"])
def test_the_form_for_the_gpu_agrees_with_the_one_for_the_cpu(monkeypatch, form):
    labels = make_labels(3, ignored=form == "ignored")
    logits = make_logits(3)
    expected = torch.autograd.grad(loss_of(logits, labels, 3), logits)

    def whole_levels(values, masks, grads, weight, gamma):
        levels = [module.masked_view(x, mask) for x, mask in zip(values, masks)]
        views = [None if g is None else g[:-1].view(x.shape) for g, x in zip(grads, levels)]
        sums = [
            module.background_sum(x, mask, g, weight, gamma)
            for x, mask, g in zip(levels, masks, views)
        ]
        return torch.stack(sums).sum()

    value = loss_of(logits, labels, 3)
    monkeypatch.setattr(classification, "sum_as_background", whole_levels)
    other = loss_of(logits, labels, 3)
    torch.testing.assert_close(other, value)
    for found, gradient in zip(torch.autograd.grad(other, logits), expected):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def test_values_are_taken_from_where_each_anchor_lies():
    num_cells = 3
    maps = [torch.randn(NUM_IMAGES, num_cells * 4, *size, requires_grad=True) for size in SIZES]
    flat = [
        level.view(NUM_IMAGES, num_cells, 4, -1).permute(0, 3, 1, 2).reshape(NUM_IMAGES, -1, 4)
        for level in maps
    ]
    flat = torch.cat(flat, dim=1)  # (N, R, 4)
    images = torch.randint(NUM_IMAGES, (40,))
    anchor_idxs = torch.randint(flat.shape[1], (40,))
    found = read_maps(maps, places_of(images, anchor_idxs, num_cells), num_cells)
    assert torch.equal(found, flat[images, anchor_idxs])
    weights = torch.randn(40, 4)
    ours = torch.autograd.grad((found * weights).sum(), maps)
    expected = torch.autograd.grad((flat[images, anchor_idxs] * weights).sum(), maps)
    for gradient, other in zip(ours, expected):
        torch.testing.assert_close(gradient, other)
