"""The rule of the paper: the statistics of an object decide (ATSS, Sec. 4.1, Algorithm 1).

An object looks at the anchors nearest to its centre on every level and keeps those whose IoU stands
out among them.
"""

from typing import Sequence

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..anchor_grid import AnchorGrid, Anchors, num_anchors_per_level
from ..checks import check_integer
from ..geometry import box_centers, centers_inside, elementwise_iou
from .assignment import Assignment, concatenate_boxes, resolve_claims
from .candidates import nearest_anchors, nearest_on_lattice
from .pairwise import check_center_in_gt, check_margin


class ATSSAssigner:
    """Adaptive training sample selection (Algorithm 1).

    For each object: the k locations nearest to its centre on every level, with all their anchors,
    are candidates; its threshold is mean plus standard deviation of their IoUs; candidates that
    reach it and whose centre lies inside the object are positive. An anchor claimed by several
    objects goes to the highest IoU, then to the earlier object.

    On an `AnchorGrid` the work depends on objects and k only, not on the image; no matrix of
    objects by anchors is built and nothing waits for the GPU. A plain list of `Boxes` is searched
    whole.

    Args:
        topk: k, locations per level (Table 4). A level with fewer gives all it has.
        center_margin: least distance in pixels from a positive's centre to every side, exclusive.
        center_in_gt: require the centre inside at all.
        min_positives_per_gt: an object that claims fewer anchors than this claims its best
            candidates by IoU instead, wherever their centre lies. 0, the paper's rule, leaves small
            objects without positives at times.
        anchors_per_location: A for a plain list of `Boxes`, which does not say; a grid does.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        topk: int = 9,
        center_margin: float = 0.01,
        center_in_gt: bool = True,
        min_positives_per_gt: int = 0,
        anchors_per_location: int = 1,
    ):
        for name, value, least in (
            ("topk", topk, 1),
            ("min_positives_per_gt", min_positives_per_gt, 0),
            ("anchors_per_location", anchors_per_location, 1),
        ):
            check_integer("ATSSAssigner", name, value, least, f"model.assigner.{name}")
        self.topk = topk
        self.min_positives_per_gt = min_positives_per_gt
        self.anchors_per_location = anchors_per_location
        self.center_margin = check_margin("ATSSAssigner", center_margin)
        self.center_in_gt = check_center_in_gt("ATSSAssigner", center_in_gt)

    def __call__(self, anchors: Anchors, gt_boxes: Sequence[Boxes]) -> Assignment:
        """Assign the anchors of a batch in one pass: S = M * C samples."""
        device = anchors.device if isinstance(anchors, AnchorGrid) else anchors[0].device
        boxes = concatenate_boxes(gt_boxes, device)  # (M, 4)
        if isinstance(anchors, AnchorGrid):
            candidates = nearest_on_lattice(anchors, box_centers(boxes), self.topk)
        else:
            topk = self.topk * self.anchors_per_location
            candidates = nearest_anchors(anchors, box_centers(boxes), topk)

        ious = elementwise_iou(boxes.unsqueeze(1), candidates.boxes)  # (M, C)
        is_claimed = ious >= adaptive_threshold(ious)
        if self.center_in_gt:
            centers = box_centers(candidates.boxes)
            is_claimed &= centers_inside(centers, boxes.unsqueeze(1), self.center_margin)
        if self.min_positives_per_gt:
            is_claimed |= self._rescue(is_claimed, ious)
        num_objects = [len(b) for b in gt_boxes]
        num_anchors = sum(num_anchors_per_level(anchors))
        return resolve_claims(candidates.anchor_idxs, is_claimed, ious, num_objects, num_anchors)

    def _rescue(self, is_claimed: Tensor, ious: Tensor) -> Tensor:
        """Claims for the best candidates of objects that have too few, (M, C) bool."""
        num_best = min(self.min_positives_per_gt, ious.shape[1])
        # Stable: of equal IoUs on a level, as those of a tiny object are, the nearest comes first.
        order = ious.sort(dim=1, descending=True, stable=True).indices
        best = torch.zeros_like(is_claimed).scatter(1, order[:, :num_best], True)
        return best & (is_claimed.sum(dim=1, keepdim=True) < self.min_positives_per_gt)


def adaptive_threshold(candidate_ious: Tensor) -> Tensor:
    """IoU an anchor must reach to be positive for its object (ATSS, Sec. 4.1).

    A high mean says the candidates suit the object, so the bar can be high; a high deviation says
    one pyramid level suits it best, so the bar should single it out.

    Args:
        candidate_ious: (M, C) IoU of each object with its own C candidates, in [0, 1].

    Returns:
        (M, 1) mean plus unbiased standard deviation over the candidates; the mean alone for C = 1.

    Example:
        >>> adaptive_threshold(torch.tensor([[0.1, 0.2, 0.6]]))
        tensor([[0.5646]])
    """
    if candidate_ious.shape[1] == 1 or len(candidate_ious) == 0:
        return candidate_ious[:, :1]
    std, mean = torch.std_mean(candidate_ious, dim=1, keepdim=True)
    return mean + std
