"""Proposals of a first stage: the selection whose result a second stage judges again.

As in Detectron2's RPN the best are kept whatever their score; only duplicates and boxes too small
to pool from are removed.
"""

from collections.abc import Sequence
from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

from ..checks import check_integer, check_range
from ..predictions import flatten_level
from .selection import SelectionInputs


class ProposalSelector:
    """Proposals of a class-agnostic dense core.

    Args:
        pre_nms_topk: how many boxes of a level go into NMS, in training and in evaluation.
        post_nms_topk: how many proposals an image gets, in training and in evaluation.
        nms_thresh: IoU above which the box of lower score is removed. All levels compete: ATSS
            assigns an object to several of them and their scores mean the same.
        min_box_size: boxes narrower or lower than this, in pixels, are removed, and empty ones.
        sqrt_score: score is sqrt(class * quality) instead of the plain product.

    Raises:
        ValueError: for numbers out of range.
    """

    is_first_stage = True

    def __init__(
        self,
        pre_nms_topk: Tuple[int, int] = (2000, 1000),
        post_nms_topk: Tuple[int, int] = (1000, 1000),
        nms_thresh: float = 0.7,
        min_box_size: float = 0.0,
        sqrt_score: bool = True,
    ):
        for name, value in (("pre_nms_topk", pre_nms_topk), ("post_nms_topk", post_nms_topk)):
            key = (
                f"model.proposal_generator.selector.{name} (MODEL.RPN.{name.upper()}_TRAIN and "
                "_TEST)"
            )
            if not isinstance(value, Sequence) or len(value) != 2:
                raise ValueError(
                    f"ProposalSelector needs {name} as two numbers >= 1, for training and for "
                    f"evaluation, got {value!r}. Change {key}."
                )
            for count in value:
                check_integer("ProposalSelector", name, count, 1, key)
        key = "model.proposal_generator.selector"
        check_range("ProposalSelector", "nms_thresh", nms_thresh, 0, 1, f"{key}.nms_thresh")
        check_range("ProposalSelector", "min_box_size", min_box_size, 0, key=f"{key}.min_box_size")
        self.pre_nms_topk = tuple(pre_nms_topk)
        self.post_nms_topk = tuple(post_nms_topk)
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size
        self.sqrt_score = sqrt_score

    @torch.no_grad()
    def __call__(self, inputs: SelectionInputs, training: bool = False) -> List[Instances]:
        """Proposals of a batch; no gradient passes.

        Args:
            inputs: predictions of a head with one class, and what turns them into boxes.
            training: which of the two numbers count.

        Returns:
            N `Instances` with `proposal_boxes` and `objectness_logits`, by falling score. The
            logits are those of the final score.

        Raises:
            FloatingPointError: in training, for predictions that are not finite.
        """
        predictions, anchors, image_sizes, decode = inputs
        pre_nms_topk = self.pre_nms_topk[0 if training else 1]
        num_anchors = predictions.num_anchors
        boxes_per_level, scores_per_level = [], []
        for i, level in enumerate(anchors):
            quality = None if predictions.quality is None else predictions.quality[i]
            scores = log_scores(predictions.logits[i], quality, self.sqrt_score)  # (N, Ri)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            scores, order = scores[:, :pre_nms_topk], order[:, :pre_nms_topk]
            deltas = flatten_level(predictions.deltas[i], num_anchors)  # (N, Ri, 4)
            deltas = deltas.gather(1, order.unsqueeze(2).expand(-1, -1, 4))
            boxes = decode(deltas.reshape(-1, 4).float(), level.tensor[order.reshape(-1)])
            boxes_per_level.append(boxes.view(*order.shape, 4))
            scores_per_level.append(scores)
        boxes = torch.cat(boxes_per_level, dim=1)  # (N, D, 4)
        scores = torch.cat(scores_per_level, dim=1)  # (N, D)
        is_finite = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores)
        if training and not bool(is_finite.all()):
            raise FloatingPointError("Predicted boxes or scores are not finite: training diverged.")
        return [
            self._select(boxes[i][is_finite[i]], scores[i][is_finite[i]], image_size, training)
            for i, image_size in enumerate(image_sizes)
        ]

    def _select(
        self, boxes: Tensor, scores: Tensor, image_size: Tuple[int, int], training: bool
    ) -> Instances:
        candidates = Boxes(boxes)
        candidates.clip(image_size)
        keep = candidates.nonempty(threshold=self.min_box_size)
        candidates, scores = candidates[keep], scores[keep]
        one_group = torch.zeros_like(scores, dtype=torch.int64)
        keep = batched_nms(candidates.tensor, scores, one_group, self.nms_thresh)
        keep = keep[: self.post_nms_topk[0 if training else 1]]
        proposals = Instances(image_size)
        proposals.proposal_boxes = candidates[keep]
        proposals.objectness_logits = log_to_logits(scores[keep])
        return proposals


def log_scores(logits: Tensor, quality: Optional[Tensor], sqrt_score: bool = True) -> Tensor:
    """Logarithm of the score of every anchor of a level.

    In logarithms small scores stay apart that would be equal, or 0, in float32.

    Args:
        logits: (N, A, Hi, Wi) logits of the only class.
        quality: (N, A, Hi, Wi) quality logits or None.
        sqrt_score: score is sqrt(class * quality) instead of the plain product.

    Returns:
        (N, Hi*Wi*A) float32, at most 0, in the order of the anchors.
    """
    num_anchors = logits.shape[1]
    scores = F.logsigmoid(flatten_level(logits, num_anchors).float()).squeeze(2)
    if quality is None:
        return scores
    scores = scores + F.logsigmoid(flatten_level(quality, num_anchors).float()).squeeze(2)
    return scores / 2 if sqrt_score else scores


def log_to_logits(log_probabilities: Tensor) -> Tensor:
    """Logits of probabilities that are given by their logarithm; ranks the same, always finite.

    Args:
        log_probabilities: any shape, at most 0.

    Returns:
        log(p / (1 - p)) for each.

    Example:
        >>> log_to_logits(torch.tensor([0.5, 0.9]).log())
        tensor([0.0000, 2.1972])
    """
    least = torch.finfo(log_probabilities.dtype).tiny
    complement = (-torch.expm1(log_probabilities)).clamp(min=least)
    return log_probabilities - complement.log()
