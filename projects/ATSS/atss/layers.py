"""Layers of the head that are not in Detectron2."""

import torch
from torch import Tensor, nn

__all__ = ["LevelScale"]


class LevelScale(nn.Module):
    """One learned factor for one pyramid level, so that levels can share a head (Table 1, last row).

    Args:
        initial: value at the start of training.
    """

    def __init__(self, initial: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (N, C, H, W) by the factor."""
        return x * self.scale
