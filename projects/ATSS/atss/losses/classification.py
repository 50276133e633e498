"""Axis 3 of 4: losses of the class of every anchor.

Nearly all of the N*R*K logits have the target 0. Pass 1 sums the loss of all logits as negatives,
with its gradient, in cache-sized blocks. Pass 2 corrects the few positives. There is no one-hot
tensor and no permuted copy of the logits: one buffer of their size in the forward, the gradient,
and its scaled copy in the backward.
"""

from typing import Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_range
from ..device import CompiledWhereSupported, is_compiling
from ..predictions import FlatMaps, Places

# From here on sigmoid(x) is 1 and softplus(x) is x in float32; exp(x) would overflow at 88.7.
_LARGE = 80.0
# exp(x) is 0 in float32: with this logit an anchor adds nothing, neither value nor gradient.
_IGNORED = -110.0
# Elements of a block: its three scratch rows fit into the cache of a core, and an operation on it
# lasts longer than its call.
_BLOCK = 1 << 17


class ClassLoss:
    """A class loss, summed over all anchors and classes in one pass over the logits.

    A subclass says what a logit costs at the class of a positive (`positive_term`); every other
    logit is background and costs weight * p^gamma * softplus(x), with p = sigmoid(x).

    Args:
        background_weight: weight of that term.
        gamma: its exponent, >= 0.

    Attributes:
        uses_ious: whether the target of a positive is the IoU of its predicted box where the
            assignment has no soft label; else it is 1.
    """

    uses_ious = False

    def __init__(self, background_weight: float, gamma: float):
        self.background_weight = background_weight
        self.gamma = gamma

    def positive_term(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of logits at the class of a positive, differentiable by autograd.

        Args:
            logits: (S,) float32.
            targets: (S,) float32 in [0, 1].

        Returns:
            (S,) losses.
        """
        raise NotImplementedError

    def __call__(
        self,
        logits: Sequence[Tensor],
        places: Places,
        classes: Tensor,
        targets: Tensor,
        is_positive: Tensor,
        num_anchors: int,
        is_ignored: Optional[Tensor] = None,
    ) -> Tensor:
        """Sum of the loss over all anchors and classes.

        Computed in float32 whatever the dtype of the logits. Differentiable once: the gradient is
        made together with the value. In a function that `torch.compile` traces it is written in
        plain operators instead, which the compiler fuses.

        Args:
            logits: L tensors (N, A*K, Hi, Wi), in either memory format.
            places: of S anchors, among them all positives of the batch.
            classes: (S,) int64 in 0..K-1, class of each.
            targets: (S,) in [0, 1], what the logit of that class should say where positive.
            is_positive: (S,) bool; a positive anchor appears as such exactly once.
            num_anchors: A, anchors per location.
            is_ignored: (N, R) bool, anchors that do not count; None if there are none.

        Returns:
            0-dim float32 sum, not normalised.
        """
        flat = FlatMaps.of(logits)
        levels = places.locations.levels
        offsets = flat.offsets(places, num_anchors, classes.unsqueeze(1))  # (S, 1)
        targets = targets.float()
        masks = _masks_per_level(is_ignored, logits, num_anchors, flat.channels_last)
        if is_compiling():
            values = flat.gather(places, offsets).squeeze(1).float()
            background = sum(
                _background_sum(
                    _masked_view(x, mask), mask, None, self.background_weight, self.gamma
                )
                for x, mask in zip(flat.values, masks)
            )
            return background + self._correction(values, targets, is_positive)
        with torch.no_grad():
            samples = flat.gather(places, offsets).squeeze(1).float()  # (S,)
        return _StreamedSum.apply(
            self, levels, offsets.squeeze(1), samples, targets, is_positive, masks, *flat.values
        )

    def _correction(self, values: Tensor, targets: Tensor, is_positive: Tensor) -> Tensor:
        """What the sum of all logits as background gains where samples are positive."""
        background = self.background_weight * _power(values.sigmoid(), self.gamma)
        change = self.positive_term(values, targets) - background * F.softplus(values)
        return torch.where(is_positive, change, 0.0).sum()


class FocalLoss(ClassLoss):
    """Sigmoid focal loss (Lin et al., 2017, Eq. 5).

    With a soft target y, the distance to the target, |y - p| for y of 0 or 1, is
    y * (1 - p) + (1 - y) * p, and the weight is mixed in the same way.

    Args:
        alpha: weight of positives in [0, 1]; 1 - alpha is that of negatives.
        gamma: focusing exponent, >= 0.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        self.alpha = check_range(
            "FocalLoss", "alpha", alpha, 0, 1, "model.loss.classification.alpha"
        )
        check_range("FocalLoss", "gamma", gamma, 0, key="model.loss.classification.gamma")
        super().__init__(1 - alpha, gamma)

    def positive_term(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of logits at the class of a positive, (S,)."""
        others = 1 - targets
        weight = self.alpha * targets + (1 - self.alpha) * others
        distance = targets * (-logits).sigmoid() + others * logits.sigmoid()
        cross_entropy = targets * F.softplus(-logits) + others * F.softplus(logits)
        return weight * _power(distance, self.gamma) * cross_entropy


class QualityFocalLoss(ClassLoss):
    """Quality focal loss: the class score of a positive learns the IoU of its box (GFL, Eq. 2).

    A soft target y costs |y - p|^beta times binary cross-entropy (Li et al., arXiv:2006.04388). The
    class score then ranks detections by itself, so the head needs no quality branch.

    Args:
        beta: focusing exponent, >= 0.

    Raises:
        ValueError: if beta is out of range.
    """

    uses_ious = True

    def __init__(self, beta: float = 2.0):
        check_range("QualityFocalLoss", "beta", beta, 0, key="model.loss.classification.beta")
        super().__init__(background_weight=1.0, gamma=beta)

    def positive_term(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of logits at the class of a positive, (S,)."""
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return _power((targets - logits.sigmoid()).abs(), self.gamma) * bce


class _StreamedSum(torch.autograd.Function):
    """Value and gradient in the forward; the backward only scales."""

    @staticmethod
    def forward(ctx, loss, levels, offsets, samples, targets, is_positive, masks, *values):
        dtype = values[0].dtype
        grads: List[Optional[Tensor]] = [None] * len(values)
        if any(ctx.needs_input_grad):
            # The factor of a gradient scaler comes with the backward: until then the small
            # gradients of negatives would be 0 in float16.
            kept = torch.float32 if dtype == torch.float16 else dtype
            # One element more: it takes what is written for samples that are not positive here.
            grads = [x.new_empty(x.numel() + 1, dtype=kept) for x in values]
        total = _sum_as_background(values, masks, grads, loss.background_weight, loss.gamma)
        if any(ctx.needs_input_grad):
            slopes = _slopes(loss, samples, targets)
            for i, grad in enumerate(grads):
                is_here = is_positive & (levels == i)
                places = torch.where(is_here, offsets, grad.numel() - 1)
                grad[places] = slopes.to(grad.dtype)
        ctx.dtype = dtype
        ctx.save_for_backward(*grads)
        return total + loss._correction(samples, targets, is_positive)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "The streamed class loss is differentiable once: its gradient, made in the "
                "forward, has no graph. Call backward or autograd.grad with create_graph=False."
            )
        grads = [(grad[:-1] * grad_output).to(ctx.dtype) for grad in ctx.saved_tensors]
        return (None, None, None, None, None, None, None, *grads)


def _slopes(loss: ClassLoss, samples: Tensor, targets: Tensor) -> Tensor:
    """Derivative of the positive term at every sample, (S,)."""
    with torch.enable_grad():
        samples = samples.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(loss.positive_term(samples, targets).sum(), samples)
    return slopes


def _power(base: Tensor, exponent: float) -> Tensor:
    """A power of values >= 0 whose derivative is finite at 0, too."""
    return base.clamp(min=torch.finfo(base.dtype).tiny).pow(exponent)


def _sum_as_background(
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
        level = _masked_view(level, mask)
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
    """`_background_sum` of a block, without new memory."""
    p, u, softplus = (row[: x.numel()].view(x.shape) for row in scratch)
    p.copy_(x)
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


def _background_sum(
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


_compiled_background_sum = CompiledWhereSupported(_background_sum)


def _masks_per_level(
    is_ignored: Optional[Tensor], logits: Sequence[Tensor], num_anchors: int, channels_last: bool
) -> List[Optional[Tensor]]:
    """Which anchors do not count, (N, R) bool, as masks that broadcast to `_masked_view`."""
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


def _masked_view(values: Tensor, mask: Optional[Tensor]) -> Tensor:
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
