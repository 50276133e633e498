"""Where in the raw output of the head do the predictions of an anchor lie?

Rules with few candidates name their positives; with the position in memory of each, a loss reads
those few values and leaves the maps as the convolutions wrote them.
"""

import itertools
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .device import host_constant

__all__ = ["Slots", "locate", "offsets_in_level", "take"]


class Slots(NamedTuple):
    """S anchors of a batch, each by its place in the predictions; all (S,) int64.

    Attributes:
        images: which of the N images.
        levels: which of the L levels.
        locations: row * Wi + column on that level.
        cell_anchors: which of the A anchors of the location.
    """

    images: Tensor
    levels: Tensor
    locations: Tensor
    cell_anchors: Tensor


def locate(
    images: Tensor,
    anchor_idxs: Tensor,
    grid_sizes: Sequence[Tuple[int, int]],
    num_cell_anchors: int,
) -> Slots:
    """Places of anchors that are given by their index among the R anchors of their image.

    Args:
        images: (S,) int64 image of each.
        anchor_idxs: (S,) int64 in 0..R-1; anchors are ordered level, row, column, cell.
        grid_sizes: L (rows, columns).
        num_cell_anchors: A, anchors per location.

    Returns:
        `Slots`.
    """
    counts = [height * width * num_cell_anchors for height, width in grid_sizes]
    first = host_constant(list(itertools.accumulate([0] + counts[:-1])), anchor_idxs.device)
    levels = (anchor_idxs.unsqueeze(1) >= first[1:]).sum(dim=1)
    places = anchor_idxs - first[levels]
    if num_cell_anchors == 1:
        return Slots(images, levels, places, torch.zeros_like(places))
    locations = torch.div(places, num_cell_anchors, rounding_mode="floor")
    return Slots(images, levels, locations, places - locations * num_cell_anchors)


def offsets_in_level(
    slots: Slots,
    channels: Tensor,
    maps: Sequence[Tensor],
    num_cell_anchors: int,
    channels_last: Optional[Sequence[bool]] = None,
) -> Tensor:
    """Positions of predictions in the memory of their level.

    Args:
        slots: S places.
        channels: (S, D') int64, which of the D predictions of the anchor.
        maps: L tensors (N, A*D, Hi, Wi); only their shapes matter.
        num_cell_anchors: A.
        channels_last: for each level, whether its memory is ordered image, row, column, channel
            instead of image, channel, row, column; none by default.

    Returns:
        (S, D') int64.
    """
    strides = []  # of an image, a channel, a location
    for i, level in enumerate(maps):
        _, depth, height, width = level.shape
        inner = (1, depth) if channels_last and channels_last[i] else (height * width, 1)
        strides.append((depth * height * width, *inner))
    table = host_constant(strides, slots.levels.device)[slots.levels]  # (S, 3)
    per_image, per_channel, per_location = table.unsqueeze(2).unbind(dim=1)  # (S, 1) each
    channels = (slots.cell_anchors * (maps[0].shape[1] // num_cell_anchors)).unsqueeze(1) + channels
    places = slots.images.unsqueeze(1) * per_image + slots.locations.unsqueeze(1) * per_location
    return places + channels * per_channel


def take(maps: Sequence[Tensor], slots: Slots, num_cell_anchors: int) -> Tensor:
    """Predictions of S anchors.

    Args:
        maps: L tensors (N, A*D, Hi, Wi), small next to the logits: they are copied. Gradients flow
            back to them.
        slots: S places.
        num_cell_anchors: A.

    Returns:
        (S, D).
    """
    starts = list(itertools.accumulate([0] + [level.numel() for level in maps[:-1]]))
    channels = torch.arange(maps[0].shape[1] // num_cell_anchors, device=slots.levels.device)
    positions = offsets_in_level(slots, channels, maps, num_cell_anchors)  # (S, D)
    positions = positions + host_constant(starts, positions.device)[slots.levels].unsqueeze(1)
    # index_select, unlike indexing, has a backward that does not sort.
    flat = torch.cat([level.reshape(-1) for level in maps])
    return flat.index_select(0, positions.view(-1)).view(positions.shape)
