"""Axis 4 of 4: how many anchors a location has, of which sizes and ratios."""

from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    DefaultAnchorGenerator,
)
from detectron2.structures import Boxes

from .anchor_grid import AnchorGrid, GraphBoxes, grid_boxes

# Padded sizes whose grids a generator keeps: their constants are on the device already.
_NUM_KEPT_GRIDS = 16


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
            grid_boxes(cell, feature, float(stride), float(self.offset))
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
