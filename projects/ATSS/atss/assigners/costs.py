"""Costs and counts that rules which look at predictions share."""

from typing import Tuple

import torch
from torch import Tensor

from ..predictions import PredictionsAt


def class_cost(
    predictions: PredictionsAt, samples: Tuple[Tensor, Tensor], classes: Tensor
) -> Tensor:
    """Binary cross-entropy of sqrt(class * quality), over all classes, with one class as the truth.

    Args:
        predictions: of the head; a missing quality counts as 1.
        samples: image and anchor of S samples, (S,) int64 each.
        classes: (S,) int64, the class of each sample's object.

    Returns:
        (S,) float32.
    """
    scores = predictions.logits(*samples).sigmoid()  # (S, K)
    quality = predictions.quality(*samples)
    if quality is not None:
        scores = scores * quality.sigmoid().unsqueeze(1)
    scores = scores.sqrt()
    # Logarithms end at -100, as in PyTorch's binary cross-entropy of probabilities.
    as_background = -torch.log1p(-scores).clamp(min=-100)
    as_object = -scores.gather(1, classes.unsqueeze(1)).log().clamp(min=-100)
    others = as_background.sum(dim=1, keepdim=True) - as_background.gather(1, classes.unsqueeze(1))
    return (others + as_object).squeeze(1)


def cheapest(cost: Tensor, ious: Tensor, is_candidate: Tensor, topk: int) -> Tensor:
    """The cheapest candidates of each object, as many as its predictions already fit.

    Args:
        cost: (M, C) cost of each object with its own C candidates.
        ious: (M, C) IoU of the predicted boxes with the object.
        is_candidate: (M, C) bool; others are never taken.
        topk: the number taken is the sum of so many best IoUs, rounded down, at least 1.

    Returns:
        (M, C) bool.
    """
    ious = torch.where(is_candidate, ious, 0.0)
    counts = ious.topk(min(topk, ious.shape[1]), dim=1).values.sum(dim=1, keepdim=True)
    cost = torch.where(is_candidate, cost, float("inf"))
    ranks = cost.argsort(dim=1, stable=True).argsort(dim=1)
    return is_candidate & (ranks < counts.floor().clamp(min=1))
