"""Raw output of a dense head, its layout in memory, and reading it at the samples of a batch."""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from .anchor_grid import AnchorGrid, LatticePlaces
from .box_regression import Box2BoxTransform, PointToBoxTransform


@dataclass(frozen=True)
class DensePredictions:
    """Raw output of a head, per level: lists of L tensors.

    Attributes:
        logits: (N, A*K, Hi, Wi) class logits, anchors before classes on axis 1.
        deltas: (N, A*4, Hi, Wi) box deltas in the terms of the box transform. Always four numbers
            an anchor: a head with another parametrisation turns it into these itself and keeps the
            rest in `extra`.
        quality: (N, A, Hi, Wi) logits of how well the box fits (centerness, or IoU), or None for a
            head without.
        num_anchors: A, anchors per location.
        extra: what else a head has for its own loss, by name.
    """

    logits: List[Tensor]
    deltas: List[Tensor]
    quality: Optional[List[Tensor]]
    num_anchors: int
    extra: Dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits[0].shape[1] // self.num_anchors

    @property
    def all_maps(self) -> List[Tensor]:
        """The maps of all levels: logits, deltas, quality."""
        return [*self.logits, *self.deltas, *(self.quality or ())]

    def check(self, num_classes: int, grid: Optional[AnchorGrid] = None) -> None:
        """Refuse maps that are not what anchors and classes ask for.

        Args:
            num_classes: K.
            grid: if given, maps have its sizes and its anchors per location.

        Raises:
            ValueError: naming the output, its channels or sizes and those needed.
        """
        if grid is not None:
            sizes = [tuple(level.shape[-2:]) for level in self.logits]
            if (self.num_anchors, sizes) != (grid.num_cell_anchors, grid.grid_sizes):
                raise ValueError(
                    f"The head predicts for {self.num_anchors} anchors at locations {sizes}, but "
                    f"there are {grid.num_cell_anchors} anchors at locations {grid.grid_sizes}. "
                    "Make model.head.num_anchors and the levels those of model.anchor_generator."
                )
        expected = (
            ("logits", self.logits, num_classes, "A*K"),
            ("deltas", self.deltas, 4, "A*4"),
            ("quality", self.quality, 1, "A"),
        )
        for name, maps, num_values, formula in expected:
            for level in maps or ():
                if level.shape[1] != self.num_anchors * num_values:
                    raise ValueError(
                        f"The head's {name} have {level.shape[1]} channels, but {formula} = "
                        f"{self.num_anchors * num_values} are needed for A = {self.num_anchors} "
                        f"anchors per location and K = {num_classes} classes. What a head predicts "
                        "beyond that belongs into DensePredictions.extra."
                    )

    def map(self, function: Callable[[Tensor], Tensor]) -> "DensePredictions":
        """Apply a function to every map, `extra` excluded."""
        logits, deltas, quality = (
            None if maps is None else [function(level) for level in maps]
            for maps in (self.logits, self.deltas, self.quality)
        )
        return DensePredictions(logits, deltas, quality, self.num_anchors, self.extra)


class Places(NamedTuple):
    """Where in the maps the predictions of S anchors lie.

    Attributes:
        image_idxs: (S,) int64, which of the N images.
        lattice: level, location and cell, (S,) each.
        num_locations: (S,) int64, Hi * Wi of that level.
        locations_before: (S,) int64, Hi * Wi of the levels before it, summed.
    """

    image_idxs: Tensor
    lattice: LatticePlaces
    num_locations: Tensor
    locations_before: Tensor

    @classmethod
    def of(cls, grid: AnchorGrid, image_idxs: Tensor, anchor_idxs: Tensor) -> "Places":
        """Places of anchors given by image and by index among the R anchors of an image."""
        lattice = grid.locate(anchor_idxs)
        return cls(image_idxs, lattice, *grid.num_locations[:, lattice.levels].unbind())


class FlatMaps(NamedTuple):
    """Maps of all levels as flat views of their memory, in one common order.

    Attributes:
        values: L tensors (N * A*V * Hi * Wi,).
        num_images: N.
        num_channels: A*V, of every map.
        channels_last: whether that order is image, row, column, channel instead of image, channel,
            row, column.
    """

    values: List[Tensor]
    num_images: int
    num_channels: int
    channels_last: bool

    @classmethod
    def of(cls, maps: Sequence[Tensor]) -> "FlatMaps":
        """Views if all maps lie in memory in one of the two orders, else copies."""
        channels_last = not all(x.is_contiguous() for x in maps) and all(
            x.is_contiguous(memory_format=torch.channels_last) for x in maps
        )
        order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
        values = [x.permute(order).reshape(-1) for x in maps]
        return cls(values, *maps[0].shape[:2], channels_last)

    def offsets(self, places: Places, num_anchors: int, which: Optional[Tensor] = None) -> Tensor:
        """Where in the values of its level each prediction lies, (S, V) int64: see `read_maps`."""
        num_values = self.num_channels // num_anchors
        if which is None:
            which = torch.arange(num_values, device=places.num_locations.device)
        _, locations, cells = places.lattice
        image_idxs, sizes, locations, cells = (
            x.unsqueeze(1) for x in (places.image_idxs, places.num_locations, locations, cells)
        )
        channels = cells * num_values + which
        if self.channels_last:
            return (image_idxs * sizes + locations) * self.num_channels + channels
        return (image_idxs * self.num_channels + channels) * sizes + locations

    def gather(self, places: Places, offsets: Tensor) -> Tensor:
        """Values at (S, V) offsets in the levels of S anchors; gradients flow back."""
        starts = places.locations_before * (self.num_images * self.num_channels)
        levels = places.lattice.levels
        return _Gather.apply(levels.unsqueeze(1), offsets, starts.unsqueeze(1), *self.values)


class _Gather(torch.autograd.Function):
    """`FlatMaps.gather`; the backward adds to one buffer for all levels, without sorting."""

    @staticmethod
    def forward(ctx, levels: Tensor, offsets: Tensor, starts: Tensor, *values: Tensor) -> Tensor:
        idxs = starts + offsets  # among the values of all levels
        ctx.save_for_backward(idxs)
        ctx.sizes = [x.numel() for x in values]
        if offsets.numel() >= sum(ctx.sizes):  # then joining the levels costs less than the search
            return torch.cat(values).index_select(0, idxs.view(-1)).view(offsets.shape)
        result = values[0].new_zeros(offsets.shape)
        for i, level in enumerate(values):
            is_here = levels == i
            here = level.index_select(0, torch.where(is_here, offsets, 0).view(-1))
            result = torch.where(is_here, here.view(offsets.shape), result)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        (idxs,) = ctx.saved_tensors
        buffer = grad.new_zeros(sum(ctx.sizes))
        buffer.index_add_(0, idxs.view(-1), grad.reshape(-1))
        return (None, None, None, *buffer.split(ctx.sizes))


def read_maps(
    maps: Sequence[Tensor], places: Places, num_anchors: int, which: Optional[Tensor] = None
) -> Tensor:
    """Predictions of S anchors, without a copy of the maps; gradients flow back.

    Args:
        maps: L tensors (N, A*V, Hi, Wi), in either memory format.
        places: of the S anchors.
        num_anchors: A.
        which: (S, 1) int64 in 0..V-1, the only value that is read of each anchor.

    Returns:
        (S, V), or (S, 1) with `which`.
    """
    flat = FlatMaps.of(maps)
    return flat.gather(places, flat.offsets(places, num_anchors, which))


class PredictionsAt:
    """What the head predicts at given samples, for rules that look at predictions.

    Reads few values and copies no map. Everything is detached and float32, boxes are in the frame
    of training.

    Args:
        predictions: raw output of the head.
        anchors: the grid of the batch.
        box2box_transform: what the deltas mean.
    """

    def __init__(
        self,
        predictions: DensePredictions,
        anchors: AnchorGrid,
        box2box_transform: Union[Box2BoxTransform, PointToBoxTransform],
    ):
        self.num_anchors = anchors.num_anchors
        self.num_classes = predictions.num_classes
        self._predictions = predictions.map(Tensor.detach)
        self._anchors = anchors
        self._transform = box2box_transform

    def logits(self, image_idxs: Tensor, anchor_idxs: Tensor) -> Tensor:
        """(S, K) class logits of samples, given by (S,) image and (S,) anchor of the image."""
        return self._read(self._predictions.logits, image_idxs, anchor_idxs)

    def class_logits(self, image_idxs: Tensor, anchor_idxs: Tensor, classes: Tensor) -> Tensor:
        """(S,) logits of one class each, `classes` (S,) in 0..K-1."""
        return self._read(
            self._predictions.logits, image_idxs, anchor_idxs, classes.unsqueeze(1)
        ).squeeze(1)

    def boxes(self, image_idxs: Tensor, anchor_idxs: Tensor) -> Tensor:
        """(S, 4) predicted boxes, xyxy in pixels."""
        deltas = self._read(self._predictions.deltas, image_idxs, anchor_idxs)
        return self._transform.apply_deltas(deltas, self._anchors.boxes_at(anchor_idxs))

    def quality(self, image_idxs: Tensor, anchor_idxs: Tensor) -> Optional[Tensor]:
        """(S,) quality logits, or None for a head without."""
        if self._predictions.quality is None:
            return None
        return self._read(self._predictions.quality, image_idxs, anchor_idxs).squeeze(1)

    def sum_over_classes(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum of an elementwise function of the logits over classes, (N, R) float32.

        The function sees one image of one level at a time, (A, K, Hi*Wi) float32.
        """
        levels: List[Tensor] = []
        for level in self._predictions.logits:
            shape = (len(level), self._predictions.num_anchors, self.num_classes, -1)
            sums = [function(image.float()).sum(dim=1) for image in level.reshape(shape)]
            levels.append(torch.stack(sums).transpose(1, 2).reshape(len(level), -1))
        return torch.cat(levels, dim=1)

    def _read(
        self,
        maps: List[Tensor],
        image_idxs: Tensor,
        anchor_idxs: Tensor,
        which: Optional[Tensor] = None,
    ) -> Tensor:
        places = Places.of(self._anchors, image_idxs, anchor_idxs)
        return read_maps(maps, places, self._predictions.num_anchors, which).float()


def flatten_level(prediction: Tensor, num_anchors: int) -> Tensor:
    """Bring the predictions of a level, (N, A*V, Hi, Wi), into the order of its anchors.

    Returns:
        (N, Hi*Wi*A, V): by row, column, anchor.
    """
    num_images, num_channels, height, width = prediction.shape
    num_values = num_channels // num_anchors
    prediction = prediction.view(num_images, num_anchors, num_values, height, width)
    return prediction.permute(0, 3, 4, 1, 2).reshape(num_images, -1, num_values)


def flatten_levels(predictions: Sequence[Tensor], num_anchors: int) -> Tensor:
    """`flatten_level` of L levels, joined: (N, R, V)."""
    return torch.cat([flatten_level(level, num_anchors) for level in predictions], dim=1)
