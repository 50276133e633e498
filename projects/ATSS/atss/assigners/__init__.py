"""Axis 1 of 4: which anchors are positive.

Every rule is a callable over a whole batch that returns an `Assignment`: see `Assigner` for rules
that see anchors and ground truth, `PredictionAssigner` for those that also see predictions.
"""

from .assignment import (
    Assigner,
    Assignment,
    PredictionAssigner,
    assign_all_anchors,
    concatenate_boxes,
    images_of_objects,
    resolve_claims,
)
from .atss import ATSSAssigner, adaptive_threshold
from .iou import IoUAssigner
from .simota import SimOTAAssigner
from .ssc import FCOS_SIZE_RANGES, SSCAssigner
from .topk import TopKAssigner

__all__ = [
    "ATSSAssigner",
    "Assigner",
    "Assignment",
    "FCOS_SIZE_RANGES",
    "IoUAssigner",
    "PredictionAssigner",
    "SSCAssigner",
    "SimOTAAssigner",
    "TopKAssigner",
    "adaptive_threshold",
    "assign_all_anchors",
    "concatenate_boxes",
    "images_of_objects",
    "resolve_claims",
]
