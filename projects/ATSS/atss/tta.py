"""Test-time augmentation: detection in several sizes and mirrored, merged by voting (Table 8).

Each view is a resized, perhaps mirrored copy of the image on which the detector runs as always.
Views differ in the sizes of objects that they are trusted with.
"""

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
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

from .checks import check_choice
from .postprocessing import Detections
from .postprocessing.eager import suppress
from .postprocessing.voting import vote_boxes


class View(NamedTuple):
    """How one copy of the image is made, and which detections in it count.

    Attributes:
        min_size: short edge in pixels; None takes the image as it comes.
        max_size: most pixels of the long edge.
        flip: mirror it left to right.
        size_range: least and greatest size (square root of area) of the boxes that count, in
            pixels of this view, inclusive.
    """

    min_size: Optional[int] = None
    max_size: int = 1333
    flip: bool = False
    size_range: Tuple[float, float] = (0.0, math.inf)


# Table 8: short edge of each scale and the sizes of boxes it is trusted with.
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


def release_views(flip: bool = True, base_size: float = 800, max_size: int = 4000) -> List[View]:
    """The 13 scales of the authors' multi-scale testing, each with its mirror image.

    Args:
        flip: add the mirror image of each.
        base_size: short edge of plain testing, the authors' 800; everything is scaled with it, for
            models trained on images of another size.
        max_size: most pixels of the long edge in any view.
    """
    unit = base_size / 800
    views = [
        View(
            min_size=round(size * unit),
            max_size=min(round((1333 if size <= 800 else 3000) * unit), max_size),
            size_range=(low * unit, high * unit),
        )
        for size, (low, high) in _RELEASE_RANGES.items()
    ]
    return _with_mirror_images(views) if flip else views


def make_views(
    min_sizes: Sequence[int],
    max_size: int = 4000,
    flip: bool = True,
    size_ranges: Sequence[Tuple[float, float]] = (),
) -> List[View]:
    """Views of several scales.

    Args:
        min_sizes, max_size: see `View`.
        flip: add the mirror image of each.
        size_ranges: one per scale, see `View`; none for no limits.

    Raises:
        ValueError: for another number of ranges than of scales.
    """
    if size_ranges and len(size_ranges) != len(min_sizes):
        raise ValueError(
            f"TEST.AUG.SIZE_RANGES has {len(size_ranges)} ranges for {len(min_sizes)} scales in "
            "TEST.AUG.MIN_SIZES; give one per scale, or () for no limits."
        )
    ranges = size_ranges or [(0.0, math.inf)] * len(min_sizes)
    views = [
        View(int(size), int(max_size), size_range=(float(low), float(high)))
        for size, (low, high) in zip(min_sizes, ranges)
    ]
    return _with_mirror_images(views) if flip else views


def _with_mirror_images(views: Sequence[View]) -> List[View]:
    return [view._replace(flip=flip) for view in views for flip in (False, True)]


class ATSSWithTTA(nn.Module):
    """A detector that looks at each image several times.

    Called as the detector is; also made as `ATSSWithTTA(cfg, model)`. Every view is a full
    detection with the detector's own NMS, one view at a time, so memory is that of the largest
    view.

    Args:
        model: detector that takes Detectron2's dicts and gives `pred_boxes`, `scores` and
            `pred_classes`.
        views: the views; by default `release_views()`.
        merge: "nms", "vote" or "soft-vote" (see `vote_boxes`).
        nms_thresh: IoU above which the lower score is removed, for "nms".
        vote_thresh: IoU at which boxes vote together.
        soft_score_thresh: least score of a box that "soft-vote" brings back.
        max_detections: how many to keep of an image; negative keeps all.
        read_files: start scaled views from the image's file, not from the already scaled image, if
            the file exists and has the size that "height" and "width" say.

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
            raise ValueError(
                "ATSSWithTTA needs at least one view; see train.tta.min_sizes (TEST.AUG.MIN_SIZES)."
            )
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.views = views
        key = "train.tta.merge (TEST.AUG.MERGE)"
        self.merge = check_choice("ATSSWithTTA", "merge", merge, ("nms", "vote", "soft-vote"), key)
        self.nms_thresh = nms_thresh
        self.vote_thresh = vote_thresh
        self.soft_score_thresh = soft_score_thresh
        self.max_detections = max_detections
        self.read_files = read_files
        # Evaluation returns a model to the mode it found it in.
        self.training = self.model.training

    @classmethod
    def from_config(cls, cfg, model: nn.Module) -> Dict[str, Any]:
        aug = cfg.TEST.AUG
        if tuple(aug.MIN_SIZES) == RELEASE_MIN_SIZES and not aug.SIZE_RANGES:
            views = release_views(aug.FLIP, cfg.INPUT.MIN_SIZE_TEST or 800, aug.MAX_SIZE)
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
        results = []
        for inputs in batched_inputs:
            height, width = inputs["image"].shape[1:]
            inputs = {"height": height, "width": width, **inputs}  # the size of the output
            original = self._read_original(inputs)
            found = [self._detect_view(inputs, original, view) for view in self.views]
            results.append({"instances": found[0] if len(found) == 1 else self._merge(found)})
        return results

    def _read_original(self, inputs: Dict) -> Optional[np.ndarray]:
        """The image's file as an array (H, W, C), if it is of use and has the size expected."""
        name, size = inputs.get("file_name"), (inputs["height"], inputs["width"])
        input_format = getattr(self.model, "input_format", None)
        is_scaled = any(view.min_size is not None for view in self.views)
        if not (self.read_files and name and input_format and is_scaled):
            return None
        if inputs["image"].shape[1:] == size or not PathManager.isfile(name):
            return None
        image = read_image(name, format=input_format)
        return image if image.shape[:2] == size else None

    def _detect_view(self, inputs: Dict, original: Optional[np.ndarray], view: View) -> Instances:
        """What counts of the detections in a view, in the frame of the output."""
        image = _view_image(inputs["image"], original, view)
        size = image.shape[1:]
        found = self.model([{**inputs, "image": image, "height": size[0], "width": size[1]}])
        found = found[0]["instances"]
        boxes = found.pred_boxes.tensor
        if view.flip:
            x1, y1, x2, y2 = boxes.unbind(dim=1)
            boxes = torch.stack((size[1] - x2, y1, size[1] - x1, y2), dim=1)
        result = Detections(boxes, found.scores, found.pred_classes).to_instances(size)
        low, high = view.size_range
        box_sizes = result.pred_boxes.area().sqrt()
        result = result[(box_sizes >= low) & (box_sizes <= high)]
        return detector_postprocess(result, inputs["height"], inputs["width"])

    def _merge(self, found: List[Instances]) -> Instances:
        """Detections of all views, in one frame, as those of one image."""
        joined = Instances.cat(found)
        candidates = Detections(joined.pred_boxes.tensor, joined.scores, joined.pred_classes)
        if self.merge == "nms":
            merged = suppress(candidates, self.nms_thresh, self.max_detections)
        else:
            is_soft = self.merge == "soft-vote"
            merged = vote_boxes(candidates, self.vote_thresh, is_soft, self.soft_score_thresh)
            if self.max_detections >= 0:
                merged = merged.at(slice(self.max_detections))
        return merged.to_instances(joined.image_size)


def _view_image(image: Tensor, original: Optional[np.ndarray], view: View) -> Tensor:
    """(C, H, W) of a view; on the host if it is resized."""
    if view.min_size is not None:
        array = image.cpu().permute(1, 2, 0).numpy() if original is None else original
        resize = ResizeShortestEdge(view.min_size, view.max_size).get_transform(array)
        array = resize.apply_image(np.ascontiguousarray(array))
        image = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    return image.flip(2) if view.flip else image
