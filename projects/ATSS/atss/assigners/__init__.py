"""Axis 1 of the paper: which anchors are positive, and for which object?

Every rule is a callable `(anchors, gt_boxes) -> Assignment` over a whole batch.
"""

from .assignment import Assignment, Claims, resolve_claims
from .atss import ATSSAssigner, adaptive_threshold

__all__ = [
    "ATSSAssigner",
    "Assignment",
    "Claims",
    "adaptive_threshold",
    "resolve_claims",
]
