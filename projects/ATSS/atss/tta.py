"""What do several views of an image say together? Multi-scale testing with voting (Table 8).

Each view is a resized, perhaps mirrored copy of the image on which the detector runs as always;
views differ in which sizes of objects they are trusted with, and their boxes are merged at the end.
"""

import copy
import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import configurable
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager

from .postprocessing.eager import Detections, suppress
from .postprocessing.voting import vote_boxes

__all__ = ["ATSSWithTTA", "RELEASE_MIN_SIZES", "View", "make_views", "release_views"]

_MERGES = ("nms", "vote", "soft-vote")


class View(NamedTuple):
    """One way to look at an image.

    Attributes:
        min_size: short edge in pixels; None takes the image as it comes.
        max_size: most pixels of the long edge.
        flip: mirror it left to right.
        size_range: least and greatest size (square root of area) of the boxes that count, in
            pixels of this view, both included.
    """

    min_size: Optional[int] = None
    max_size: int = 1333
    flip: bool = False
    size_range: Tuple[float, float] = (0.0, math.inf)


# Table 8: which sizes of boxes each scale is trusted with.
_RELEASE_RANGES = {
    800: (0, math.inf),
    400: (96, math.inf),
    500: (96, math.inf),
    600: (64, math.inf),
    640: (64, math.inf),
    700: (64, math.inf),
    900: (0, math.inf),
    1000: (0, math.inf),
    1100: (0, 256),
    1200: (0, 256),
    1300: (0, 192),
    1400: (0, 192),
    1800: (0, 96),
}
RELEASE_MIN_SIZES = tuple(_RELEASE_RANGES)


def release_views(flip: bool = True, base_size: float = 800) -> List[View]:
    """The 13 scales of the authors' multi-scale testing, each with its mirror image.

    Args:
        flip: with the mirror images.
        base_size: short edge of plain testing, the authors' 800; for a model that is used to images
            of another size, everything is scaled with it.
    """
    unit = base_size / 800
    return [
        View(
            round(size * unit),
            round((1333 if size <= 800 else 3000) * unit),
            is_flipped,
            (low * unit, high * unit),
        )
        for size, (low, high) in _RELEASE_RANGES.items()
        for is_flipped in ((False, True) if flip else (False,))
    ]


def make_views(
    min_sizes: Sequence[int],
    max_size: int = 4000,
    flip: bool = True,
    size_ranges: Sequence[Tuple[float, float]] = (),
) -> List[View]:
    """Views of several scales.

    Args:
        min_sizes: short edges in pixels.
        max_size: most pixels of the long edge.
        flip: add the mirror image of each.
        size_ranges: one per scale, see `View`; none for no limits.

    Raises:
        ValueError: for as many ranges as do not fit.
    """
    if size_ranges and len(size_ranges) != len(min_sizes):
        raise ValueError(
            f"TEST.AUG.SIZE_RANGES has {len(size_ranges)} ranges for {len(min_sizes)} scales in "
            "TEST.AUG.MIN_SIZES; give one per scale, or () for no limits."
        )
    ranges = size_ranges or [(0.0, math.inf)] * len(min_sizes)
    return [
        View(int(size), int(max_size), is_flipped, (float(low), float(high)))
        for size, (low, high) in zip(min_sizes, ranges)
        for is_flipped in ((False, True) if flip else (False,))
    ]


class ATSSWithTTA(nn.Module):
    """A detector that looks at each image several times.

    Called as the detector is, also as `ATSSWithTTA(cfg, model)`. Every view is a full detection
    with the detector's own NMS, one view at a time, so memory is that of the largest view. Where an
    image's file is known and has the size its dict says, scaled views start from it and not from
    the already scaled image.

    Args:
        model: detector that takes Detectron2's dicts and gives `pred_boxes`, `scores` and
            `pred_classes`.
        views: the views; by default `release_views()`.
        merge: "nms", "vote" or "soft-vote" (see `vote_boxes`).
        nms_thresh: IoU above which the lower score goes, for "nms".
        vote_thresh: IoU at which boxes vote together.
        soft_score_thresh: least score of a box that "soft-vote" brings back.
        max_detections: how many to keep of an image.
        read_files: start scaled views from the image's file where there is one.

    Raises:
        ValueError: for no views, or an unknown merge.
    """

    @configurable
    def __init__(
        self,
        model: nn.Module,
        views: Optional[Sequence[View]] = None,
        merge: str = "soft-vote",
        nms_thresh: float = 0.6,
        vote_thresh: float = 0.66,
        soft_score_thresh: float = 0.05,
        max_detections: int = 100,
        read_files: bool = True,
    ):
        super().__init__()
        views = release_views() if views is None else [View(*view) for view in views]
        if not views:
            raise ValueError("ATSSWithTTA needs at least one view; see TEST.AUG.MIN_SIZES.")
        if merge not in _MERGES:
            raise ValueError(f"Unknown TEST.AUG.MERGE {merge!r}; known are {list(_MERGES)}.")
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.views = views
        self.merge = merge
        self.nms_thresh = nms_thresh
        self.vote_thresh = vote_thresh
        self.soft_score_thresh = soft_score_thresh
        self.max_detections = max_detections
        self.read_files = read_files
        # Evaluation puts a model back into the mode it found it in.
        self.training = self.model.training

    @classmethod
    def from_config(cls, cfg, model: nn.Module) -> Dict[str, Any]:
        aug = cfg.TEST.AUG
        if tuple(aug.MIN_SIZES) == RELEASE_MIN_SIZES and not aug.SIZE_RANGES:
            views = release_views(aug.FLIP, cfg.INPUT.MIN_SIZE_TEST or 800)
        else:
            views = make_views(aug.MIN_SIZES, aug.MAX_SIZE, aug.FLIP, aug.SIZE_RANGES)
        return {
            "model": model,
            "views": views,
            "merge": aug.MERGE,
            "nms_thresh": cfg.MODEL.ATSS.NMS_THRESH,
            "vote_thresh": aug.VOTE_THRESH,
            "soft_score_thresh": aug.SOFT_SCORE_THRESH,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: List[Dict]) -> List[Dict[str, Instances]]:
        """Detect in each image.

        Args:
            batched_inputs: N dicts as the detector takes them.

        Returns:
            N dicts {"instances": `Instances`} in the size that "height" and "width" say.

        Raises:
            RuntimeError: in training mode of the detector.
        """
        if self.model.training:
            raise RuntimeError("ATSSWithTTA detects; call eval() first.")
        return [{"instances": self._detect(inputs)} for inputs in batched_inputs]

    def _detect(self, inputs: Dict) -> Instances:
        image = inputs["image"]
        height = int(inputs.get("height", image.shape[1]))
        width = int(inputs.get("width", image.shape[2]))
        original = self._original(inputs, (height, width))
        found = [self._detect_view(inputs, original, view, (height, width)) for view in self.views]
        if len(found) == 1:
            return found[0]
        candidates = Detections(
            torch.cat([result.pred_boxes.tensor for result in found]),
            torch.cat([result.scores for result in found]),
            torch.cat([result.pred_classes for result in found]),
        )
        merged = self._merge(candidates)
        result = Instances((height, width))
        result.pred_boxes = Boxes(merged.boxes)
        result.scores = merged.scores
        result.pred_classes = merged.classes
        return result

    def _merge(self, candidates: Detections) -> Detections:
        if self.merge == "nms":
            keep = suppress(candidates, self.nms_thresh, self.max_detections)
            return Detections(*(part[keep] for part in candidates))
        voted = vote_boxes(
            candidates, self.vote_thresh, self.merge == "soft-vote", self.soft_score_thresh
        )
        if self.max_detections < 0:
            return voted
        return Detections(*(part[: self.max_detections] for part in voted))

    def _original(self, inputs: Dict, size: Tuple[int, int]) -> Optional[np.ndarray]:
        """The image's file as an array (H, W, C), if it is there and of the size wanted."""
        name = inputs.get("file_name")
        is_needed = any(view.min_size is not None for view in self.views)
        input_format = getattr(self.model, "input_format", None)
        if not (self.read_files and name and is_needed and input_format):
            return None
        if inputs["image"].shape[1:] == size or not PathManager.isfile(name):
            return None
        image = read_image(name, format=input_format)
        return image if image.shape[:2] == size else None

    def _detect_view(
        self,
        inputs: Dict,
        original: Optional[np.ndarray],
        view: View,
        size: Tuple[int, int],
    ) -> Instances:
        image = _view_image(inputs["image"], original, view)
        view_height, view_width = image.shape[1:]
        view_inputs = copy.copy(inputs)
        view_inputs.update(image=image, height=view_height, width=view_width)
        result = self.model([view_inputs])[0]["instances"]
        boxes = result.pred_boxes.tensor
        if view.flip:
            x1, y1, x2, y2 = boxes.unbind(dim=1)
            boxes = torch.stack((view_width - x2, y1, view_width - x1, y2), dim=1)
        low, high = view.size_range
        sizes = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=0).sqrt()
        keep = (sizes >= low) & (sizes <= high)
        kept = Instances((view_height, view_width))
        kept.pred_boxes = Boxes(boxes[keep])
        kept.scores = result.scores[keep]
        kept.pred_classes = result.pred_classes[keep]
        return detector_postprocess(kept, *size)


def _view_image(image: Tensor, original: Optional[np.ndarray], view: View) -> Tensor:
    """(C, H, W) of a view; on the host if it is resized."""
    if view.min_size is not None:
        array = original
        if array is None:
            array = image.cpu().permute(1, 2, 0).numpy()
        resize = ResizeShortestEdge(view.min_size, view.max_size).get_transform(array)
        array = resize.apply_image(np.ascontiguousarray(array))
        image = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    return image.flip(2) if view.flip else image
