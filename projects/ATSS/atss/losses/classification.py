"""Axis 3 of 4: losses of the class of every anchor.

Nearly all of the N*R*K logits have the target 0. Pass 1 sums the loss of all logits as negatives,
with its gradient, in cache-sized blocks. Pass 2 corrects the few positives. There is no one-hot
tensor and no permuted copy of the logits: one buffer of their size in the forward, the gradient,
and its scaled copy in the backward.
"""

from typing import List, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_range
from ..device import is_compiling
from ..predictions import FlatMaps, Places
from .background import background_sum, masked_view, masks_per_level, sum_as_background


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
        levels = places.lattice.levels
        offsets = flat.offsets(places, num_anchors, classes.unsqueeze(1))  # (S, 1)
        targets = targets.float()
        masks = masks_per_level(is_ignored, logits, num_anchors, flat.channels_last)
        if is_compiling():
            values = flat.gather(places, offsets).squeeze(1).float()
            background = sum(
                background_sum(masked_view(x, mask), mask, None, self.background_weight, self.gamma)
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
        check_range("FocalLoss", "alpha", alpha, 0, 1, "model.loss.classification.alpha")
        check_range("FocalLoss", "gamma", gamma, 0, key="model.loss.classification.gamma")
        super().__init__(1 - alpha, gamma)
        self.alpha = alpha

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
        total = sum_as_background(values, masks, grads, loss.background_weight, loss.gamma)
        if any(ctx.needs_input_grad):
            slopes = _slopes(loss, samples, targets)
            for i, grad in enumerate(grads):
                is_here = is_positive & (levels == i)
                written = torch.where(is_here, offsets, grad.numel() - 1)
                grad[written] = slopes.to(grad.dtype)
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
