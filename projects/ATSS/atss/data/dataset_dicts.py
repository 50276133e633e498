"""Loading of registered data sets, with checks that do not depend on their format."""

import numbers
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.structures import BoxMode

from .annotations import box_flaw, check_image_files, log_flaws, raise_if_any


def check_dataset_dicts(
    dataset_dicts: Sequence[Dict[str, Any]],
    num_classes: int,
    dataset_name: str,
    with_masks: bool = False,
) -> List[Dict[str, Any]]:
    """Images in Detectron2's format without their empty boxes, after checks of all others.

    Args:
        dataset_dicts: images of a registered set; they are not changed.
        num_classes: K; each category_id must be in 0..K-1.
        dataset_name: for messages.
        with_masks: every object needs an outline.

    Returns:
        The same images, with new annotation lists where a box was dropped.

    Raises:
        FileNotFoundError: an image file is missing.
        ValueError: see `check_image_files`, `box_flaw`; a class id is out of range; an outline is
            missing.
    """
    check_image_files(dataset_dicts, dataset_name)
    problems, flaws, cleaned = [], Counter(), []
    for number, image in enumerate(dataset_dicts):
        annotations = image.get("annotations", ())
        kept = []
        for index, annotation in enumerate(annotations):
            try:
                flaw = _flaw(annotation, image, num_classes)
                outline = annotation.get("segmentation", ())
                if with_masks and (outline is None or len(outline) == 0):
                    raise ValueError(
                        "no segmentation, which a mask head learns (model.roi_heads.mask_head, "
                        "MODEL.MASK_ON)"
                    )
            except ValueError as error:
                name = image.get("image_id", number)
                problems.append(f"annotation {index} (from 0) of image {name} has {error}")
                continue
            flaws[flaw] += 1
            if flaw != "empty":
                kept.append(annotation)
        cleaned.append({**image, "annotations": kept} if len(kept) < len(annotations) else image)
    raise_if_any(problems, f"in data set {dataset_name}")
    log_flaws(flaws, dataset_name)
    return cleaned


def load_dataset_dicts(
    names: Union[str, Sequence[str]],
    num_classes: int,
    filter_empty: bool = True,
    with_masks: bool = False,
) -> List[Dict[str, Any]]:
    """Detectron2's `get_detection_dataset_dicts` with `check_dataset_dicts` before anything else.

    Args:
        names: registered sets; their images are concatenated.
        num_classes, with_masks: see `check_dataset_dicts`, whose errors this shares.
        filter_empty: leave out images without annotations or with crowds only.

    Raises:
        ValueError: also if no image is left.
    """
    names = [names] if isinstance(names, str) else list(names)
    dataset_dicts = []
    for name in names:
        images = DatasetCatalog.get(name)
        dataset_dicts.extend(check_dataset_dicts(images, num_classes, name, with_masks))
    has_annotations = all("annotations" in image for image in dataset_dicts)
    if filter_empty and has_annotations:
        dataset_dicts = filter_images_with_only_crowd_annotations(dataset_dicts)
    if not dataset_dicts:
        raise ValueError(f"No image with an object is left to train on in {', '.join(names)}.")
    class_names = MetadataCatalog.get(names[0]).get("thing_classes")
    if has_annotations and class_names:
        check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(dataset_dicts, class_names)
    return dataset_dicts


def _flaw(annotation: Dict[str, Any], image: Dict[str, Any], num_classes: int) -> Optional[str]:
    """What `box_flaw` says; a ValueError says what the annotation has that is wrong."""
    mode, box = annotation.get("bbox_mode"), annotation.get("bbox")
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise ValueError(f"bbox_mode {mode!r}, and only XYXY_ABS and XYWH_ABS are known")
    class_id = annotation.get("category_id")
    if not isinstance(class_id, numbers.Integral) or not 0 <= class_id < num_classes:
        raise ValueError(f"category_id {class_id}, and the model knows 0 to {num_classes - 1}")
    try:
        return box_flaw(box, mode == BoxMode.XYXY_ABS, image)
    except ValueError as error:
        shown = box.tolist() if isinstance(box, np.ndarray) else box
        raise ValueError(f"bbox {shown}, {error}") from None
