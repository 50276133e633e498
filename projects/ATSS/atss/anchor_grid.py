"""Anchors of one padded image size, and the lattice they lie on.

Anchors of a pyramid level repeat one small set of cell anchors at every location of a regular
lattice. `AnchorGrid` keeps that knowledge beside the boxes: a rule that looks for the locations
nearest to an object computes them instead of searching all of them, and the box of an anchor
follows from its index.
"""

import itertools
from functools import cached_property
from typing import Dict, Hashable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from detectron2.structures import Boxes

from .device import host_constant


@torch.jit.script_if_tracing
def grid_boxes(cell_anchors: Tensor, feature: Tensor, stride: float, offset: float) -> Tensor:
    # Scripted when traced: arange then takes size and device from the tensors of the run, while a
    # plain trace would freeze those of the example image (as Detectron2 0.5's generator does).
    height, width = feature.shape[-2], feature.shape[-1]
    device = cell_anchors.device
    x = (torch.arange(width, device=device, dtype=torch.float32) + offset) * stride
    y = (torch.arange(height, device=device, dtype=torch.float32) + offset) * stride
    x_grid = x.unsqueeze(0).expand(height, width)
    y_grid = y.unsqueeze(1).expand(height, width)
    centers = torch.stack((x_grid, y_grid, x_grid, y_grid), dim=-1).reshape(-1, 1, 4)
    return (centers + cell_anchors).reshape(-1, 4)


class GraphBoxes(Boxes):
    """`Boxes` for `torch.jit.trace`: Detectron2 0.5's own freeze the device into a trace.

    Args:
        tensor: (D, 4) float32, xyxy in pixels; kept as it is.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __getitem__(self, item) -> "GraphBoxes":
        return GraphBoxes(self.tensor[item])


class LatticePlaces(NamedTuple):
    """Where anchors lie on the lattice of their level. All tensors have the shape of the indices.

    Attributes:
        levels: int64 in 0..L-1.
        locations: int64, row * Wi + column on that level.
        cells: int64 in 0..A-1, which of the anchors of the location.
    """

    levels: Tensor
    locations: Tensor
    cells: Tensor


class AnchorGrid:
    """Anchors of one padded image size which also know the lattice they lie on.

    The centre of column j, row i of a level is ((j + offset) * stride, (i + offset) * stride), and
    all A anchors of that location are its cell anchors moved there. Anchors of a level are ordered
    by row, column, anchor, as Detectron2 orders them; levels follow each other.

    Numbers of the levels are tensors on the device, uploaded once: `widths` (L,), `level_starts`
    (L,), the index of the first anchor, and `num_locations` (2, L), Hi * Wi and the sum of these
    over the levels before, all int64; `stride_values` (L,) and `cell_anchors` (L, A, 4), float32.

    Args:
        grid_sizes: L pairs (Hi, Wi): locations of each level.
        strides: L strides in pixels.
        cell_anchors: per level (A, 4) anchors xyxy around (0, 0), in pixels. A is the same on all
            levels; every cell anchor is centred on (0, 0).
        offset: centre of the first location in units of the stride, 0.5 by default.
        device: where the anchors live; by default where the cell anchors are.

    Raises:
        ValueError: if the numbers of levels differ, or cell anchors have another shape.

    Example:
        >>> square = torch.tensor([[-4.0, -4.0, 4.0, 4.0]])
        >>> grid = AnchorGrid([(1, 2)], [8], [square])
        >>> grid.boxes[0].tensor
        tensor([[ 0.,  0.,  8.,  8.],
                [ 8.,  0., 16.,  8.]])
        >>> grid.boxes_at(torch.tensor([1]))
        tensor([[ 8.,  0., 16.,  8.]])
    """

    def __init__(
        self,
        grid_sizes: Sequence[Tuple[int, int]],
        strides: Sequence[float],
        cell_anchors: Sequence[Tensor],
        offset: float = 0.5,
        device: Optional[Union[str, torch.device]] = None,
    ):
        if not len(grid_sizes) == len(strides) == len(cell_anchors) > 0:
            raise ValueError(
                "AnchorGrid needs one grid size, one stride and one set of cell anchors per level, "
                f"got {len(grid_sizes)}, {len(strides)} and {len(cell_anchors)}."
            )
        shapes = {tuple(cell.shape) for cell in cell_anchors}
        if len(shapes) != 1 or cell_anchors[0].dim() != 2 or cell_anchors[0].shape[1] != 4:
            raise ValueError(
                "AnchorGrid needs cell anchors of one shape (A, 4) on all levels, got shapes "
                f"{[tuple(cell.shape) for cell in cell_anchors]}."
            )
        self.device = torch.device(device) if device is not None else cell_anchors[0].device
        self.grid_sizes = [(int(height), int(width)) for height, width in grid_sizes]
        self.strides = [float(stride) for stride in strides]
        self.offset = float(offset)
        self.cell_anchors = torch.stack(
            [cell.to(self.device, torch.float32) for cell in cell_anchors]
        )
        self._constants: Dict[Hashable, Tensor] = {}

    @property
    def num_cell_anchors(self) -> int:
        """A, the number of anchors at each location."""
        return self.cell_anchors.shape[1]

    @property
    def num_anchors_per_level(self) -> List[int]:
        """Hi * Wi * A for each level."""
        return [height * width * self.num_cell_anchors for height, width in self.grid_sizes]

    @property
    def num_anchors(self) -> int:
        """R, the number of anchors of an image."""
        return sum(self.num_anchors_per_level)

    @cached_property
    def boxes(self) -> List[Boxes]:
        """L `Boxes`, each (Hi * Wi * A, 4), xyxy in pixels of the padded input."""
        return [
            Boxes(grid_boxes(cell, cell.new_empty(0, height, width), stride, self.offset))
            for cell, (height, width), stride in zip(
                self.cell_anchors, self.grid_sizes, self.strides
            )
        ]

    @cached_property
    def widths(self) -> Tensor:
        return self.constant("widths", [width for _, width in self.grid_sizes])

    @cached_property
    def num_locations(self) -> Tensor:
        counts = [height * width for height, width in self.grid_sizes]
        before = itertools.accumulate([0, *counts[:-1]])
        return self.constant("num_locations", [counts, list(before)])

    @cached_property
    def level_starts(self) -> Tensor:
        counts = self.num_anchors_per_level[:-1]
        return self.constant("level_starts", list(itertools.accumulate([0, *counts])))

    @cached_property
    def stride_values(self) -> Tensor:
        return self.constant("strides", self.strides, torch.float32)

    def constant(
        self, name: Hashable, values: Sequence, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Numbers of the host on the device of the grid, uploaded at the first request only.

        Args:
            name: of the numbers; the same name always means the same numbers.
            values: (nested) sequence of numbers.
            dtype: of the result.
        """
        if name not in self._constants:
            self._constants[name] = host_constant(values, self.device, dtype)
        return self._constants[name]

    def locate(self, anchor_idxs: Tensor) -> LatticePlaces:
        """Level, location and cell of anchors, (...) int64 in 0..R-1."""
        levels = torch.bucketize(anchor_idxs, self.level_starts, right=True) - 1
        idxs = anchor_idxs - self.level_starts[levels]  # among the anchors of the level
        if self.num_cell_anchors == 1:
            return LatticePlaces(levels, idxs, torch.zeros_like(idxs))
        locations = torch.div(idxs, self.num_cell_anchors, rounding_mode="floor")
        return LatticePlaces(levels, locations, idxs % self.num_cell_anchors)

    def boxes_at(self, anchor_idxs: Tensor) -> Tensor:
        """Boxes of the given anchors, computed from their places on the lattice.

        Args:
            anchor_idxs: (...) int64 in 0..R-1.

        Returns:
            (..., 4) float32 xyxy in pixels, the same bits as `boxes` has.
        """
        return self.boxes_of(self.locate(anchor_idxs))

    def boxes_of(self, places: LatticePlaces) -> Tensor:
        """`boxes_at` for anchors that are located already."""
        levels, locations, cells = places
        width = self.widths[levels]
        rows = torch.div(locations, width, rounding_mode="floor")
        centers = torch.stack((locations - rows * width, rows), dim=-1).float() + self.offset
        centers = centers * self.stride_values[levels].unsqueeze(-1)
        return torch.cat((centers, centers), dim=-1) + self.cell_anchors[levels, cells]

    def __len__(self) -> int:
        return len(self.grid_sizes)


Anchors = Union[AnchorGrid, Sequence[Boxes]]


def num_anchors_per_level(anchors: Anchors) -> List[int]:
    """Number of anchors on each level, known on the host."""
    if isinstance(anchors, AnchorGrid):
        return anchors.num_anchors_per_level
    return [len(level) for level in anchors]


def concatenate_anchors(anchors: Anchors) -> Tensor:
    """Boxes of all levels in one tensor.

    Args:
        anchors: an `AnchorGrid`, or L `Boxes`.

    Returns:
        (R, 4) xyxy in pixels.
    """
    boxes = anchors.boxes if isinstance(anchors, AnchorGrid) else anchors
    return torch.cat([level.tensor for level in boxes])
