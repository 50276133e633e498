"""The focal loss of all anchors and classes, in one pass over the logits.

Nearly all of the N*R*K logits have the target 0. So every logit is first treated as a negative, in
blocks that stay in the cache, value and gradient together; then the few whose target is 1 are put
right. No one-hot tensor, no permuted copy of the logits; the gradient is the only buffer of their
size.
"""

from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..device import CompiledWhereSupported, is_compiling
from ..slots import Slots, offsets_in_level

__all__ = ["focal_loss_sum"]

# From here on sigmoid(x) is 1 and softplus(x) is x in float32; exp(x) would overflow at 88.7.
_LARGE = 80.0
# Elements of a block: its three scratch rows fit into the cache of a core, and an operation on it
# lasts longer than its call.
_BLOCK = 1 << 17


def focal_loss_sum(
    logits: Sequence[Tensor],
    slots: Slots,
    classes: Tensor,
    is_positive: Tensor,
    num_cell_anchors: int,
    is_ignored: Optional[Tensor] = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Sum of the sigmoid focal loss over all anchors and classes (Lin et al., 2017, Eq. 5).

    Computed in float32 whatever the dtype of the logits. Differentiable once: the gradient is made
    together with the value. In a function that `torch.compile` traces it is written in plain
    operators instead, which the compiler fuses.

    Args:
        logits: L tensors (N, A*K, Hi, Wi), in either memory format.
        slots: S anchors, among them all positives of the batch.
        classes: (S,) int64 class of each, in 0..K-1 where positive, anything elsewhere.
        is_positive: (S,) bool; a positive anchor appears as such exactly once.
        num_cell_anchors: A, anchors per location.
        is_ignored: (N, R) bool, anchors that do not count; None if there are none.
        alpha: weight of positives; 1 - alpha is that of negatives.
        gamma: focusing exponent, >= 0.

    Returns:
        0-dim float32 sum, not normalised.
    """
    levels = [level if _is_dense(level) else level.contiguous() for level in logits]
    channels_last = [not level.is_contiguous() for level in levels]
    num_classes = levels[0].shape[1] // num_cell_anchors
    channels = classes.clamp(min=0, max=num_classes - 1).unsqueeze(1)
    offsets = offsets_in_level(slots, channels, levels, num_cell_anchors, channels_last).squeeze(1)
    places = _Places(slots.levels, offsets, is_positive)

    # Views in the order of the memory; with weights, of a shape that those broadcast to.
    weights: List[Optional[Tensor]] = [None] * len(levels)
    if is_ignored is not None:
        weights = _weights_per_level(~is_ignored, levels, channels_last, num_cell_anchors)
    levels = [
        _in_order_of_memory(level, is_last, None if weight is None else num_cell_anchors)
        for level, is_last, weight in zip(levels, channels_last, weights)
    ]
    if is_compiling():
        values = _gather(levels, places)
        sums = [_negative_sum(x, w, None, alpha, gamma) for x, w in zip(levels, weights)]
        return sum(sums) + _correction(values, is_positive, alpha, gamma)
    return _FocalLoss.apply(places, weights, alpha, gamma, *levels)


class _Places(NamedTuple):
    """S places in the logits: level, offset in its memory, whether the target there is 1."""

    levels: Tensor
    offsets: Tensor
    is_positive: Tensor


class _FocalLoss(torch.autograd.Function):
    """Value and gradient in the forward; the backward only scales."""

    @staticmethod
    def forward(ctx, places, weights, alpha, gamma, *levels):
        ctx.dtype, ctx.shapes = levels[0].dtype, [level.shape for level in levels]
        grads: List[Optional[Tensor]] = [None] * len(levels)
        if any(ctx.needs_input_grad):
            # The factor of a gradient scaler comes with the backward: until then the small
            # gradients of negatives would be 0 in float16.
            dtype = torch.float32 if ctx.dtype == torch.float16 else ctx.dtype
            # One element more: it takes what is written for slots that are not positive here.
            grads = [x.new_empty(x.numel() + 1, dtype=dtype) for x in levels]
        total = _sum_as_negatives(levels, weights, grads, alpha, gamma)
        values = _gather(levels, places)  # (S,)
        for i, grad in enumerate(grads):
            if grad is not None:
                is_here = places.is_positive & (places.levels == i)
                targets = torch.where(is_here, places.offsets, grad.numel() - 1)
                grad[targets] = _positive_grad(values, alpha, gamma).to(grad.dtype)
        ctx.save_for_backward(*grads)
        return total + _correction(values, places.is_positive, alpha, gamma)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "The streaming focal loss is differentiable once: its gradient, made in the "
                "forward, has no graph. Call backward or autograd.grad with create_graph=False."
            )
        grads = [
            (grad[:-1] * grad_output).to(ctx.dtype).view(shape)
            for grad, shape in zip(ctx.saved_tensors, ctx.shapes)
        ]
        return (None, None, None, None, *grads)


def _sum_as_negatives(
    levels: Sequence[Tensor],
    weights: Sequence[Optional[Tensor]],
    grads: Sequence[Optional[Tensor]],
    alpha: float,
    gamma: float,
) -> Tensor:
    """Sum of the loss as if no anchor were positive; writes its gradient into `grads`."""
    sums: List[Tensor] = []
    largest = max(level.numel() for level in levels)
    scratch: Optional[Tensor] = None
    if levels[0].device.type == "cpu":
        scratch = torch.empty(3, min(_BLOCK, largest), dtype=torch.float32, device="cpu")
    for level, weight, grad in zip(levels, weights, grads):
        grad = None if grad is None else grad[:-1].view(level.shape)
        if scratch is None:
            sums.append(_fused_negative_sum(level, weight, grad, alpha, gamma))
            continue
        for x, w, out in _blocks(level, weight, grad):
            sums.append(_negative_block(x, w, out, scratch, alpha, gamma))
    return torch.stack(sums).sum()


def _negative_block(
    x: Tensor,
    weight: Optional[Tensor],
    grad: Optional[Tensor],
    scratch: Tensor,
    alpha: float,
    gamma: float,
) -> Tensor:
    """`_negative_sum` of a block, without new memory."""
    p, u, softplus = (row[: x.numel()].view(x.shape) for row in scratch)
    p.copy_(x)
    beyond = p.clone() if weight is not None else p.sum()
    p.clamp_(max=_LARGE)
    # What the clamp took from softplus: 0, but for logits that large, infinite or NaN.
    beyond = beyond - p.sum() if weight is None else ((beyond - p) * weight).sum()
    p.exp_()
    torch.add(p, 1, out=u)
    torch.log1p(p, out=softplus)
    p.div_(u)  # sigmoid(x)
    torch.div(softplus, u, out=u)  # (1 - p) softplus(x)
    torch.add(p, u, alpha=gamma, out=u)
    p.pow_(gamma)
    if weight is not None:
        p.mul_(weight)
    if grad is not None:
        u.mul_(p)
        torch.mul(u, 1 - alpha, out=grad)
    return (torch.dot(p.view(-1), softplus.view(-1)) + beyond) * (1 - alpha)


def _negative_sum(
    x: Tensor, weight: Optional[Tensor], grad: Optional[Tensor], alpha: float, gamma: float
) -> Tensor:
    """Loss of logits whose target is 0: (1 - alpha) p^gamma softplus(x), p = sigmoid(x), summed.

    d/dx p^gamma softplus(x) = p^gamma (gamma (1 - p) softplus(x) + p).

    Args:
        x: logits.
        weight: factor of each, broadcasts; None for 1.
        grad: of the shape of x, takes the gradient of the sum; None if it is not wanted.
        alpha, gamma: of the focal loss.

    Returns:
        0-dim float32 sum.
    """
    x = x.float()
    # Not 0, where a power below 1 has no derivative.
    p = x.sigmoid().clamp(min=torch.finfo(x.dtype).tiny)
    softplus = F.softplus(x)
    factor = (1 - alpha) * p.pow(gamma)
    if weight is not None:
        factor = factor * weight
    if grad is not None:
        grad.copy_(factor * (gamma * (1 - p) * softplus + p))
    return (factor * softplus).sum()


_fused_negative_sum = CompiledWhereSupported(_negative_sum)


def _correction(values: Tensor, is_positive: Tensor, alpha: float, gamma: float) -> Tensor:
    """What the sum gains where targets are 1: alpha (1 - p)^gamma softplus(-x) less the above."""
    p, q = values.sigmoid(), (-values).sigmoid()
    loss = alpha * q.pow(gamma) * F.softplus(-values)
    loss = loss - (1 - alpha) * p.pow(gamma) * F.softplus(values)
    return torch.where(is_positive, loss, 0.0).sum()


def _positive_grad(values: Tensor, alpha: float, gamma: float) -> Tensor:
    """d/dx alpha (1 - p)^gamma softplus(-x)."""
    p, q = values.sigmoid(), (-values).sigmoid()
    return -alpha * q.pow(gamma) * (gamma * p * F.softplus(-values) + q)


def _gather(levels: Sequence[Tensor], places: _Places) -> Tensor:
    """Logits at S places, (S,) float32; those of other levels are not visited."""
    device = places.offsets.device
    values = torch.zeros(places.offsets.shape, dtype=torch.float32, device=device)
    for i, level in enumerate(levels):
        is_here = places.levels == i
        here = level.reshape(-1)[torch.where(is_here, places.offsets, 0)]
        values = torch.where(is_here, here.float(), values)
    return values


def _weights_per_level(
    counts: Tensor, levels: Sequence[Tensor], channels_last: Sequence[bool], num_cell_anchors: int
) -> List[Tensor]:
    """Which anchors count, (N, R) bool, as 0 or 1 in the shapes of `_in_order_of_memory`."""
    weights, first = [], 0
    for level, is_last in zip(levels, channels_last):
        num_images, _, height, width = level.shape
        last = first + height * width * num_cell_anchors
        weight = counts[:, first:last].to(torch.float32)
        if is_last:
            weights.append(weight.reshape(-1, 1))
        else:
            weight = weight.view(num_images, height * width, num_cell_anchors).transpose(1, 2)
            weights.append(weight.reshape(num_images * num_cell_anchors, 1, height * width))
        first = last
    return weights


def _in_order_of_memory(level: Tensor, is_last: bool, num_cell_anchors: Optional[int]) -> Tensor:
    """A view of a level: flat, or (N*A, K, Hi*Wi) or (N*Hi*Wi*A, K) to be weighted by anchor."""
    num_images, depth, height, width = level.shape
    if is_last:
        level = level.permute(0, 2, 3, 1)
    if num_cell_anchors is None:
        return level.reshape(-1)
    if is_last:
        return level.reshape(-1, depth // num_cell_anchors)
    return level.reshape(num_images * num_cell_anchors, depth // num_cell_anchors, height * width)


def _blocks(
    x: Tensor, weight: Optional[Tensor], grad: Optional[Tensor]
) -> Iterator[Tuple[Tensor, Optional[Tensor], Optional[Tensor]]]:
    """Contiguous parts of at most `_BLOCK` elements."""
    if x.numel() <= _BLOCK:
        yield x, weight, grad
        return
    weight = None if weight is None else weight.expand(x.shape)
    inner = x.numel() // len(x)
    step = max(_BLOCK // inner, 1)
    for i in range(0, len(x), step):
        rows = slice(i, i + step) if inner <= _BLOCK else i
        yield from _blocks(*(None if part is None else part[rows] for part in (x, weight, grad)))


def _is_dense(level: Tensor) -> bool:
    return level.is_contiguous() or level.is_contiguous(memory_format=torch.channels_last)
