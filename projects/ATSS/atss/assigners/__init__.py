"""Axis 1 of the paper: which anchors are positive, and for which object?

Every rule is a callable `(anchors, gt_boxes) -> Assignment` over a whole batch.
"""

from .assignment import Assignment, Claims, resolve_claims
from .atss import ATSSAssigner, adaptive_threshold
from .iou import IoUAssigner
from .ssc import FCOS_SIZE_RANGES, SSCAssigner
from .topk import TopKAssigner

__all__ = [
    "ATSSAssigner",
    "Assignment",
    "Claims",
    "FCOS_SIZE_RANGES",
    "IoUAssigner",
    "SSCAssigner",
    "TopKAssigner",
    "adaptive_threshold",
    "resolve_claims",
]
