"""Candidates of each object: the anchors nearest to its centre on every level.

The first half of ATSS's rule. On a lattice the answer is computed from the position of the object;
`nearest_anchors` does a full search, for anchors that are not on a lattice.
"""

import math
from functools import cache
from typing import List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..anchor_grid import AnchorGrid
from ..geometry import box_centers, center_distances


class Candidates(NamedTuple):
    """The C candidate anchors of each of M objects, levels in order, nearest first on each.

    Attributes:
        anchor_idxs: (M, C) int64 indices into the R anchors of an image.
        boxes: (M, C, 4) those anchors, xyxy in pixels.
    """

    anchor_idxs: Tensor
    boxes: Tensor


def nearest_on_lattice(anchors: AnchorGrid, centers: Tensor, topk: int) -> Candidates:
    """Anchors of the k locations nearest to each point on every level, found on the lattice.

    Nearest by dx * dx + dy * dy in float32; of equal distances the smaller flat (row-major) index
    comes first, on every device. Only locations among the nearest columns and the nearest rows can
    be among the k nearest, so a few dozen are compared per level, however large the level is
    (`_window_ranks`). Exact for points within 2^15 px of the lattice.

    Args:
        anchors: the grid, L levels with A anchors per location.
        centers: (M, 2) points (x, y) in pixels, inside the image or not.
        topk: k; a level with fewer locations gives all of them.

    Returns:
        `Candidates` with C = sum over levels of min(k, Hi * Wi) * A.
    """
    device = anchors.device
    heights, widths = zip(*anchors.grid_sizes)
    size = anchors.constant("sizes", [widths, heights]).unsqueeze(2)  # (2, L, 1): axis before level
    # Steps of the flat index from a column, and from a row, to the next.
    pitch = anchors.constant("pitches", [[1] * len(widths), widths]).unsqueeze(2)
    stride = anchors.stride_values  # (L,)
    reach = (topk + 2) // 2  # the k + 1 nearest columns lie within so many of the nearest one
    span = torch.arange(2 * reach + 1, device=device)

    points = centers.unsqueeze(-1)  # (M, 2, 1)
    # Equally near columns: the smaller one, hence ceil(u - 1/2) and not round(u).
    nearest = torch.ceil(points / stride - anchors.offset - 0.5).to(torch.int64)
    first = torch.minimum(nearest.unsqueeze(-1) - reach, size - len(span)).clamp(min=0)
    indices = first + span  # (M, 2, L, w): the w columns, and rows, of the window
    steps = (indices.float() + anchors.offset) * stride.unsqueeze(-1) - points.unsqueeze(-1)
    steps = steps.masked_fill(indices >= size, float("inf"))
    order = steps.abs().sort(dim=-1, stable=True).indices
    indices, steps = indices.gather(-1, order), steps.gather(-1, order)  # nearest first

    # Of the two axes, the parts that a location adds up: squared distances, and flat indices
    # (row-major within the level; int32, which halves the memory). Ranks come first, so that
    # selecting them copies whole blocks.
    squares = (steps * steps).permute(1, 3, 0, 2).contiguous()  # (2, w, M, L)
    terms = (indices * pitch).int().permute(1, 3, 0, 2).contiguous()
    ranks = anchors.constant(("window ranks", topk), _window_ranks(topk))
    column_ranks, row_ranks = ranks.unbind()  # (P,) each
    distances = squares[0].index_select(0, column_ranks)  # (P, M, L), in place: these are large
    distances += squares[1].index_select(0, row_ranks)
    # Bits of non-negative floats sort as the floats do; the location behind them breaks ties.
    # Locations that do not exist are infinitely far, so they come last.
    keys = distances.view(torch.int32).to(torch.int64)
    del distances
    keys <<= 32
    keys += terms[0].index_select(0, column_ranks)
    keys += terms[1].index_select(0, row_ranks)
    keys = keys.permute(1, 2, 0)  # (M, L, P)
    keys = keys.topk(min(topk, keys.shape[2]), dim=2, largest=False).values  # (M, L, k)

    locations = keys & 0xFFFFFFFF
    width, first_anchor = anchors.widths.unsqueeze(1), anchors.level_starts.unsqueeze(1)  # (L, 1)
    rows = torch.div(locations, width, rounding_mode="floor")
    points = torch.stack((locations - rows * width, rows), dim=-1)  # (M, L, k, 2)
    points = (points.float() + anchors.offset) * stride.view(-1, 1, 1)

    cells = anchors.cell_anchors.unsqueeze(1)  # (L, 1, A, 4)
    boxes = torch.cat((points, points), dim=-1).unsqueeze(3) + cells  # (M, L, k, A, 4)
    num_cells = anchors.num_cell_anchors
    anchor_idxs = (first_anchor + locations * num_cells).unsqueeze(3)
    if num_cells > 1:
        anchor_idxs = anchor_idxs + torch.arange(num_cells, device=device)  # (M, L, k, A)

    # A level of fewer than k locations was filled up; how many it has is known on the host.
    counts = [min(topk, height * width) for height, width in anchors.grid_sizes]
    if min(counts) == keys.shape[2]:
        return Candidates(anchor_idxs.flatten(1), boxes.flatten(1, 3))
    anchor_idxs, boxes = (
        torch.cat([part[:, i, :n].flatten(1, 2) for i, n in enumerate(counts)], dim=1)
        for part in (anchor_idxs, boxes)
    )
    return Candidates(anchor_idxs, boxes)


def within_radius_on_lattice(
    anchors: AnchorGrid, centers: Tensor, radius: float
) -> Tuple[Candidates, Tensor]:
    """Anchors around each point on every level, closer than a radius on both axes.

    Args:
        anchors: the grid, L levels with A anchors per location.
        centers: (M, 2) points (x, y) in pixels, inside the image or not.
        radius: in strides of the level, exclusive.

    Returns:
        `Candidates` of the windows that can hold such anchors, by level, row, column, cell, with
        C = L * A times the squared number of columns; and (M, C) bool, which are that close. The
        others name some anchor of the level.
    """
    heights, widths = zip(*anchors.grid_sizes)
    size = anchors.constant("sizes", [widths, heights]).unsqueeze(2)  # (2, L, 1): axis before level
    stride = anchors.stride_values.unsqueeze(1)  # (L, 1)
    points = centers.view(-1, 2, 1, 1)  # (M, 2, 1, 1)
    span = torch.arange(math.ceil(2 * radius) + 1, device=anchors.device)
    first = torch.floor(points / stride - anchors.offset - radius).to(torch.int64)
    steps = first + span  # (M, 2, L, w): the w columns, and rows, of the window
    distances = ((steps.float() + anchors.offset) * stride - points).abs()
    is_near = (distances < radius * stride) & (steps >= 0) & (steps < size)
    columns, rows = torch.minimum(steps.clamp(min=0), size - 1).unbind(dim=1)  # (M, L, w) each
    locations = rows.unsqueeze(3) * anchors.widths.view(-1, 1, 1) + columns.unsqueeze(2)
    is_near = is_near[:, 1].unsqueeze(3) & is_near[:, 0].unsqueeze(2)  # (M, L, w, w)
    cells = torch.arange(anchors.num_cell_anchors, device=anchors.device)
    starts = anchors.level_starts.view(-1, 1, 1, 1)
    anchor_idxs = starts + locations.unsqueeze(4) * len(cells) + cells  # (M, L, w, w, A)
    is_near = is_near.unsqueeze(4).expand(anchor_idxs.shape).flatten(1)
    anchor_idxs = anchor_idxs.flatten(1)
    return Candidates(anchor_idxs, anchors.boxes_at(anchor_idxs)), is_near


def nearest_anchors(anchors: Sequence[Boxes], centers: Tensor, topk: int) -> Candidates:
    """The k anchors nearest to each point on every level, by a full search.

    Args:
        anchors: L `Boxes`.
        centers: (M, 2) points (x, y) in pixels.
        topk: k anchors per level; of equal distances the smaller index comes first.

    Returns:
        `Candidates` with C = sum over levels of min(k, Ri).
    """
    anchor_idxs: List[Tensor] = []
    boxes: List[Tensor] = []
    first = 0
    for level in anchors:
        distances = center_distances(centers.unsqueeze(1), box_centers(level.tensor))  # (M, Ri)
        idxs = torch.arange(len(level), device=level.device)
        keys = (distances.view(torch.int32).to(torch.int64) << 32) | idxs
        nearest = keys.topk(min(topk, len(level)), dim=1, largest=False).values & 0xFFFFFFFF
        anchor_idxs.append(nearest + first)
        boxes.append(level.tensor[nearest])
        first += len(level)
    return Candidates(torch.cat(anchor_idxs, dim=1), torch.cat(boxes, dim=1))


@cache
def _window_ranks(topk: int) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    """Pairs (rank by |dx|, rank by |dy|), from 0, of the locations that can be among the k nearest.

    A location in column rank a and row rank b (from 1) has at least a*b - 1 others that are no
    farther, so only a*b <= k can qualify: 23 pairs for k = 9. Rounding may swap neighbouring ranks,
    so one rank of margin is kept: 31 pairs.
    """
    pairs = [
        (a - 1, b - 1)
        for a in range(1, topk + 2)
        for b in range(1, min(topk + 1, (topk + 3) // a) + 1)  # a * b < k + 4
        if a * b - min(a, 2) * min(b, 2) < topk
    ]
    columns, rows = zip(*pairs)
    return columns, rows
