"""Background pass of the class losses: all logits as negatives, in cache-sized blocks.

A background logit x costs weight * p^gamma * softplus(x), with p = sigmoid(x). Value and gradient
are made together, block by block, without a one-hot tensor or a permuted copy of the logits.
"""

from typing import Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..device import CompiledWhereSupported

# From here on sigmoid(x) is 1 and softplus(x) is x in float32; exp(x) would overflow at 88.7.
_LARGE = 80.0
# exp(x) is 0 in float32: with this logit an anchor adds nothing, neither value nor gradient.
_IGNORED = -110.0
# Elements of a block: its three scratch rows fit into the cache of a core, and an operation on it
# lasts longer than its call.
_BLOCK = 1 << 17


def sum_as_background(
    values: Sequence[Tensor],
    masks: Sequence[Optional[Tensor]],
    grads: Sequence[Optional[Tensor]],
    weight: float,
    gamma: float,
) -> Tensor:
    """Sum of the loss as if no anchor were positive; writes its gradient into `grads`."""
    sums: List[Tensor] = []
    scratch: Optional[Tensor] = None
    if values[0].device.type == "cpu":
        largest = max(level.numel() for level in values)
        scratch = torch.empty(3, min(_BLOCK, largest), dtype=torch.float32, device="cpu")
    for level, mask, grad in zip(values, masks, grads):
        level = masked_view(level, mask)
        grad = None if grad is None else grad[:-1].view(level.shape)
        if scratch is None:
            sums.append(_compiled_background_sum(level, mask, grad, weight, gamma))
            continue
        for x, is_ignored, out in _blocks(level, mask, grad):
            sums.append(_background_block(x, is_ignored, out, scratch, weight, gamma))
    return torch.stack(sums).sum()


def _background_block(
    x: Tensor,
    mask: Optional[Tensor],
    grad: Optional[Tensor],
    scratch: Tensor,
    weight: float,
    gamma: float,
) -> Tensor:
    """`background_sum` of a block, without new memory."""
    p, u, softplus = (row[: x.numel()].view(x.shape) for row in scratch)
    p.copy_(x).clamp_(min=_IGNORED)  # an infinite difference would make `beyond` NaN
    if mask is not None:
        p.masked_fill_(mask, _IGNORED)
    beyond = p.sum()
    p.clamp_(max=_LARGE)
    # What the clamp took from softplus: 0, but for logits that large, infinite or NaN.
    beyond = beyond - p.sum()
    p.exp_()
    torch.add(p, 1, out=u)
    torch.log1p(p, out=softplus)
    p.div_(u)  # sigmoid(x)
    torch.div(softplus, u, out=u)  # (1 - p) softplus(x)
    torch.add(p, u, alpha=gamma, out=u)
    p.pow_(gamma)
    if grad is not None:
        u.mul_(p)
        torch.mul(u, weight, out=grad)
    return (torch.dot(p.view(-1), softplus.view(-1)) + beyond) * weight


def background_sum(
    x: Tensor, mask: Optional[Tensor], grad: Optional[Tensor], weight: float, gamma: float
) -> Tensor:
    """Loss of background logits, weight * p^gamma * softplus(x) with p = sigmoid(x), summed.

    d/dx p^gamma softplus(x) = p^gamma (gamma (1 - p) softplus(x) + p).

    Args:
        x: logits.
        mask: bool, which of them do not count, broadcasts; None for none.
        grad: of the shape of x, takes the gradient of the sum; None if it is not wanted.
        weight, gamma: see `ClassLoss`.

    Returns:
        0-dim float32 sum.
    """
    x = x.float()
    if mask is not None:
        x = x.masked_fill(mask, _IGNORED)
    # Not 0, where a power below 1 has no derivative.
    p = x.sigmoid().clamp(min=torch.finfo(x.dtype).tiny)
    softplus = F.softplus(x)
    factor = weight * p.pow(gamma)
    if grad is not None:
        grad.copy_(factor * (gamma * (1 - p) * softplus + p))
    return (factor * softplus).sum()


_compiled_background_sum = CompiledWhereSupported(background_sum)


def masks_per_level(
    is_ignored: Optional[Tensor], logits: Sequence[Tensor], num_anchors: int, channels_last: bool
) -> List[Optional[Tensor]]:
    """Which anchors do not count, (N, R) bool, as masks that broadcast to `masked_view`."""
    if is_ignored is None:
        return [None] * len(logits)
    masks: List[Optional[Tensor]] = []
    first = 0
    for level in logits:
        num_images, _, height, width = level.shape
        last = first + height * width * num_anchors
        mask = is_ignored[:, first:last].reshape(num_images, height * width, num_anchors)
        if channels_last:
            masks.append(mask.reshape(-1, 1))
        else:
            masks.append(mask.transpose(1, 2).reshape(num_images * num_anchors, 1, -1))
        first = last
    return masks


def masked_view(values: Tensor, mask: Optional[Tensor]) -> Tensor:
    """A flat level as it is, or as (N*A, K, Hi*Wi) or (N*Hi*Wi*A, K) beside its mask."""
    if mask is None:
        return values
    return values.view(len(mask), -1, *mask.shape[2:])


def _blocks(
    x: Tensor, mask: Optional[Tensor], grad: Optional[Tensor]
) -> Iterator[Tuple[Tensor, Optional[Tensor], Optional[Tensor]]]:
    """Contiguous parts of at most `_BLOCK` elements."""
    if x.numel() <= _BLOCK:
        yield x, mask, grad
        return
    mask = None if mask is None else mask.expand(x.shape)
    inner = x.numel() // len(x)
    step = max(_BLOCK // inner, 1)
    for i in range(0, len(x), step):
        rows = slice(i, i + step) if inner <= _BLOCK else i
        yield from _blocks(*(None if part is None else part[rows] for part in (x, mask, grad)))
