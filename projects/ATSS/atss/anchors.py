"""Axis 4 of 4: anchors per location, and the lattice they lie on.

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

from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    DefaultAnchorGenerator,
)
from detectron2.structures import Boxes

from .device import host_constant

# Padded sizes whose grids a generator keeps: their constants are on the device already.
_NUM_KEPT_GRIDS = 16


@torch.jit.script_if_tracing
def _grid_boxes(cell_anchors: Tensor, feature: Tensor, stride: float, offset: float) -> Tensor:
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


class Locations(NamedTuple):
    """Where anchors lie on the lattice of their level. All tensors have the shape of the indices.

    Attributes:
        levels: int64 in 0..L-1.
        positions: int64, row * Wi + column on that level.
        cells: int64 in 0..A-1, which of the anchors of the location.
    """

    levels: Tensor
    positions: Tensor
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
            Boxes(_grid_boxes(cell, cell.new_empty(0, height, width), stride, self.offset))
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

    def locate(self, anchor_idxs: Tensor) -> Locations:
        """Level, location and cell of anchors.

        Args:
            anchor_idxs: (...) int64 in 0..R-1.

        Returns:
            `Locations` of that shape.
        """
        levels = torch.bucketize(anchor_idxs, self.level_starts, right=True) - 1
        positions = anchor_idxs - self.level_starts[levels]
        if self.num_cell_anchors == 1:
            return Locations(levels, positions, torch.zeros_like(positions))
        cells = positions % self.num_cell_anchors
        positions = torch.div(positions, self.num_cell_anchors, rounding_mode="floor")
        return Locations(levels, positions, cells)

    def boxes_at(self, anchor_idxs: Tensor) -> Tensor:
        """Boxes of the given anchors, computed from their places on the lattice.

        Args:
            anchor_idxs: (...) int64 in 0..R-1.

        Returns:
            (..., 4) float32 xyxy in pixels, the same bits as `boxes` has.
        """
        return self.boxes_of(self.locate(anchor_idxs))

    def boxes_of(self, locations: Locations) -> Tensor:
        """`boxes_at` for anchors that are located already."""
        levels, positions, cells = locations
        width = self.widths[levels]
        rows = torch.div(positions, width, rounding_mode="floor")
        centers = torch.stack((positions - rows * width, rows), dim=-1).float() + self.offset
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


def octave_sizes(
    strides: Sequence[float] = (8, 16, 32, 64, 128), scale: float = 8, scales_per_octave: int = 1
) -> List[List[float]]:
    """Anchor sizes per level: `scale` times the stride, times 2^(j / scales_per_octave).

    The paper uses one square of eight strides (Sec. 3.1); RetinaNet three sizes from four strides.

    Args:
        strides: strides of the levels in pixels.
        scale: size of the smallest anchor in strides.
        scales_per_octave: number of sizes on a level.

    Returns:
        L lists of `scales_per_octave` sizes (square roots of area) in pixels.

    Raises:
        ValueError: if a stride or the scale is not positive, or the number of scales no positive
            integer.

    Example:
        >>> octave_sizes([8, 16])
        [[64.0], [128.0]]
    """
    is_integer = isinstance(scales_per_octave, int) and not isinstance(scales_per_octave, bool)
    is_positive = all(0 < value < float("inf") for value in (scale, *strides))
    if not (is_positive and is_integer and scales_per_octave >= 1):
        raise ValueError(
            "octave_sizes needs positive strides, a positive scale and an integer "
            f"scales_per_octave >= 1, got strides={list(strides)}, scale={scale}, "
            f"scales_per_octave={scales_per_octave!r}. Change model.anchor_generator.sizes."
        )
    octaves = [2 ** (j / scales_per_octave) for j in range(scales_per_octave)]
    return [[float(stride * scale * octave) for octave in octaves] for stride in strides]


@ANCHOR_GENERATOR_REGISTRY.register()
class GridAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchor generator, which can also hand out the lattice behind its anchors.

    `forward` returns a list of `Boxes`, so any Detectron2 model can use it. `grid` returns the same
    anchors as an `AnchorGrid`.

    Args:
        sizes: anchor sizes (square roots of area, pixels), a list for all levels or one per level.
        aspect_ratios: height / width, a list for all levels or one per level.
        strides: strides of the features in pixels.
        offset: centre of the first location in strides, in [0, 1).

    Raises:
        ValueError: for sizes, ratios or strides that are not positive, an offset outside [0, 1), or
            levels that differ in number of anchors.
    """

    def __init__(self, *args, **kwargs):
        try:
            super().__init__(*args, **kwargs)
        except AssertionError as error:
            # Detectron2's way to refuse an offset, an empty list or a wrong length.
            offset = getattr(self, "offset", 0.5)
            if not 0.0 <= offset < 1.0:
                raise ValueError(
                    f"GridAnchorGenerator needs offset in [0, 1), got {offset}. Change "
                    "model.anchor_generator.offset (MODEL.ANCHOR_GENERATOR.OFFSET)."
                ) from error
            raise ValueError(
                f"{error} Give model.anchor_generator (MODEL.ANCHOR_GENERATOR) one list of sizes "
                "and one of aspect ratios for all levels, or one per level."
            ) from error
        self._grids: Dict[Tuple, AnchorGrid] = {}
        if len(set(self.num_anchors)) != 1:
            raise ValueError(
                "GridAnchorGenerator needs the same number of anchors per location on every level, "
                f"got {self.num_anchors}: the levels share one head. Give each level as many sizes "
                "and ratios."
            )

    def _calculate_anchors(self, sizes, aspect_ratios):
        # Called by the parent's __init__ when sizes and ratios are one list per level.
        _check_positive("anchor_generator.sizes", sizes)
        _check_positive("anchor_generator.aspect_ratios", aspect_ratios)
        _check_positive("anchor_generator.strides", [self.strides])
        return super()._calculate_anchors(sizes, aspect_ratios)

    def _grid_anchors(self, features: Sequence[Tensor]) -> List[Tensor]:
        cells = list(self.cell_anchors)
        if len(features) != len(cells):
            raise ValueError(
                f"anchor_generator has {len(cells)} strides {list(self.strides)} but got "
                f"{len(features)} feature maps; give it one stride per feature."
            )
        return [
            _grid_boxes(cell, feature, float(stride), float(self.offset))
            for cell, feature, stride in zip(cells, features, self.strides)
        ]

    def forward(self, features: Sequence[Tensor]) -> List[Boxes]:
        """Anchors of each level.

        Args:
            features: L feature maps (N, C, Hi, Wi); only their sizes matter.

        Returns:
            L `Boxes`, (Hi * Wi * A, 4), xyxy in pixels of the padded input.
        """
        as_boxes = GraphBoxes if torch.jit.is_tracing() else Boxes
        return [as_boxes(boxes) for boxes in self._grid_anchors(features)]

    def grid(self, features: Sequence[Tensor]) -> AnchorGrid:
        """The same anchors as `forward` gives, with their lattice.

        Grids of the last few padded sizes are kept, so that their constants are uploaded once.

        Args:
            features: L feature maps (N, C, Hi, Wi); only their sizes matter.

        Returns:
            `AnchorGrid` on the device of the generator.

        Raises:
            ValueError: if there are not as many features as strides.
        """
        cells = list(self.cell_anchors)
        grid_sizes = tuple(tuple(feature.shape[-2:]) for feature in features)
        key = (grid_sizes, self.offset, tuple(self.strides), cells[0].device, cells[0].dtype)
        if key not in self._grids:
            while len(self._grids) >= _NUM_KEPT_GRIDS:
                del self._grids[next(iter(self._grids))]
            self._grids[key] = AnchorGrid(grid_sizes, self.strides, cells, self.offset)
        self._grids[key] = self._grids.pop(key)  # the last used comes last
        return self._grids[key]

    def _apply(self, *args, **kwargs):
        self._grids = {}  # cell anchors may move to another device or type
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "_grids": {}}  # neither copied nor saved


def _check_positive(name: str, values: Sequence[Sequence[float]]) -> None:
    values = [list(level) for level in values]
    if not all(level and all(0 < value < float("inf") for value in level) for level in values):
        raise ValueError(
            f"{name} must be positive, at least one on every level, got {values}. Change "
            f"model.{name} (in YAML MODEL.{name.upper()})."
        )
