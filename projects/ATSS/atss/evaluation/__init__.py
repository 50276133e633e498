"""Evaluation of detections: compact results of every process, and the evaluator of a data set."""

from .build import build_evaluator
from .coco import CompactCOCOEvaluator
from .compact import DETECTION, CompactDetections

__all__ = ["DETECTION", "CompactCOCOEvaluator", "CompactDetections", "build_evaluator"]
