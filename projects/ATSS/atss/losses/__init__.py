"""Axis 3 of 4: the losses, each of their terms a part of its own."""

from .dense import DenseLoss

__all__ = ["DenseLoss"]
