"""FCOS's rule: points inside a box, on the pyramid level made for its size (Sec. 3.3).

The paper calls it the spatial and scale constraint: a point inside a box is a candidate, and each
pyramid level is given a range of object sizes beforehand.
"""

import functools
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..anchor_grid import AnchorGrid, Anchors, concatenate_anchors, num_anchors_per_level
from ..checks import check_range
from ..geometry import box_areas, box_centers
from .assignment import Assignment
from .pairwise import DEFAULT_BUDGET, assign_image_by_image, check_budget, check_margin, chunk_size

FCOS_SIZE_RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, float("inf")))


class SSCAssigner:
    """Spatial and scale constraint: inside the box, on the level of its size (FCOS; Sec. 3.3).

    An anchor's centre with distances l, t, r, b to the sides of an object is positive if it lies
    inside and max(l, t, r, b) is in the range of its level, both ends included. Of several such
    objects the one of smallest area wins, then the earlier one. Nothing waits for the GPU.

    Args:
        size_ranges: L pairs (least, largest) of max(l, t, r, b) in pixels, from fine to coarse,
            without gaps.
        center_sampling_radius: positives lie also less than so many strides from the centre of the
            object, on both axes (Table 3, "center sampling": 1.5); None for no such limit.
        center_margin: least distance in pixels from a positive's centre to every side, exclusive.
        strides: strides of the levels for a plain list of `Boxes`, which does not say; a grid
            does. Only the radius needs them.
        budget: float32 values held at once; work that needs more goes through the anchors in
            chunks.

    Raises:
        ValueError: if an argument is out of range; at the first call, if there are not as many
            ranges as levels.
    """

    def __init__(
        self,
        size_ranges: Sequence[Tuple[float, float]] = FCOS_SIZE_RANGES,
        center_sampling_radius: Optional[float] = None,
        center_margin: float = 0.0,
        strides: Sequence[float] = (8, 16, 32, 64, 128),
        budget: int = DEFAULT_BUDGET,
    ):
        self.size_ranges = _check_ranges(size_ranges)
        if center_sampling_radius is not None:
            check_range(
                "SSCAssigner", "center_sampling_radius (in strides; None for no center sampling)",
                center_sampling_radius, 0, key="model.assigner.center_sampling_radius", ends="(]",
            )  # fmt: skip
        self.center_sampling_radius = center_sampling_radius
        self.center_margin = check_margin("SSCAssigner", center_margin)
        self.strides = tuple(float(stride) for stride in strides)
        self.budget = check_budget("SSCAssigner", budget)

    def __call__(self, anchors: Anchors, gt_boxes: Sequence[Boxes]) -> Assignment:
        """Assign the anchors of a batch, image by image: S = N * R samples.

        Raises:
            ValueError: if there are not as many size ranges (or strides) as levels.
        """
        counts = num_anchors_per_level(anchors)
        if len(counts) != len(self.size_ranges):
            raise ValueError(
                f"SSCAssigner has {len(self.size_ranges)} size ranges {list(self.size_ranges)}, "
                f"but there are {len(counts)} levels of anchors. Give "
                "model.assigner.size_ranges one range per level."
            )
        bounds = list(zip(*self.size_ranges))
        if self.center_sampling_radius is not None:
            strides = anchors.strides if isinstance(anchors, AnchorGrid) else self.strides
            if len(strides) != len(counts):
                raise ValueError(
                    f"SSCAssigner has {len(strides)} strides {list(strides)}, but there are "
                    f"{len(counts)} levels of anchors. Give model.assigner.strides one per level."
                )
            bounds.append([stride * self.center_sampling_radius for stride in strides])
        centers = box_centers(concatenate_anchors(anchors))  # (R, 2)
        # Of every anchor: its centre, and the least, the largest and the radius of its level.
        per_anchor = [centers, *(_spread(values, counts, centers.device) for values in bounds)]
        match = functools.partial(self._match, per_anchor)
        return assign_image_by_image(gt_boxes, len(centers), centers.device, match)

    def _match(
        self, per_anchor: Sequence[Tensor], boxes: Tensor
    ) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Object (R,) int64, and whether positive, of every anchor of an image; none is ignored."""
        # Smallest first: then the first object that wants an anchor wins it.
        order = box_areas(boxes).sort(stable=True).indices  # (m,)
        # One float matrix, one of int32, and a few of bool.
        size = chunk_size(3 * len(boxes), self.budget)
        winners, is_positive = zip(
            *(
                _first_true(self._wants(boxes[order], *part))
                for part in zip(*(values.split(size) for values in per_anchor))
            )
        )
        return order[torch.cat(winners)], torch.cat(is_positive), None

    def _wants(
        self,
        boxes: Tensor,
        centers: Tensor,
        least: Tensor,
        largest: Tensor,
        radius: Optional[Tensor] = None,
    ) -> Tensor:
        """Which of the (r,) anchors each of (m, 4) objects wants, (m, r) bool."""
        x, y = centers.unbind(dim=1)  # (r,) each
        x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(dim=1)  # (m, 1) each
        is_inside, fits, reaches = None, None, None
        # max(l, t, r, b) lies in the range if no side is too far, and one far enough: so one matrix
        # of floats is enough, one side after the other.
        for high, low in ((x, x1), (y, y1), (x2, x), (y2, y)):
            distances = high - low  # (m, r)
            if is_inside is None:
                is_inside = distances > self.center_margin
                fits, reaches = distances <= largest, distances >= least
            else:
                is_inside &= distances > self.center_margin
                fits &= distances <= largest
                reaches |= distances >= least
        wants = is_inside & fits & reaches
        if radius is not None:
            for points, gt_centers in zip((x, y), box_centers(boxes).unsqueeze(-1).unbind(dim=1)):
                wants &= (points - gt_centers).abs_() < radius
        return wants


def _first_true(wants: Tensor) -> Tuple[Tensor, Tensor]:
    """First true row in each column of (m, r): its index (r,), 0 if none, and whether any."""
    num_rows = len(wants)
    rows = torch.arange(num_rows, device=wants.device, dtype=torch.int32).unsqueeze(1)
    # Not argmax: on a GPU it may return any of several equal values.
    first = rows.expand(wants.shape).masked_fill(~wants, num_rows).amin(dim=0)
    is_any = first < num_rows
    return first.masked_fill(~is_any, 0).to(torch.int64), is_any


def _spread(values: Sequence[float], counts: Sequence[int], device: torch.device) -> Tensor:
    """One value per level, repeated for each of its anchors: (R,) float32, without waiting."""
    return torch.cat(
        [torch.full((n,), float(value), device=device) for value, n in zip(values, counts)]
    )


def _check_ranges(size_ranges: Sequence[Tuple[float, float]]) -> Tuple[Tuple[float, float], ...]:
    ranges = tuple(tuple(float(bound) for bound in pair) for pair in size_ranges)
    where = "Change model.assigner.size_ranges."
    if not ranges or any(len(pair) != 2 or not pair[0] < pair[1] for pair in ranges):
        raise ValueError(
            "SSCAssigner needs pairs (least, largest) of max(l, t, r, b) in pixels with least < "
            f"largest, one per level, got {list(ranges)}. {where}"
        )
    for (start, largest), (least, _) in zip(ranges, ranges[1:]):
        if least > largest:
            raise ValueError(
                f"SSCAssigner's size_ranges leave a gap: a level ends at {largest:g} px, the "
                f"next starts at {least:g} px, and objects of a size in between have no level. Let "
                f"each range start where the one before ends. {where}"
            )
        if least < start:
            raise ValueError(
                "SSCAssigner's size_ranges go from fine to coarse levels, but a range from "
                f"{least:g} px follows one from {start:g} px. {where}"
            )
    return ranges
