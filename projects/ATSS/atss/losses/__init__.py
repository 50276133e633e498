"""Axis 3 of 4: the losses of class, box and quality."""

from .classification import ClassLoss, FocalLoss, QualityFocalLoss
from .dense import DenseLoss

__all__ = ["ClassLoss", "DenseLoss", "FocalLoss", "QualityFocalLoss"]
