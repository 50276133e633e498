"""Can this COCO file be trained on? Its mistakes, found before the first iteration.

Detectron2 loads most faulty files without a word, or stops with a bare assertion hours later. Here
a fault is a `ValueError` (a missing file a `FileNotFoundError`) that names the file, the image and
the annotation. Boxes without area are no error: training drops them, and one log line counts them.
"""

import json
import logging
import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from .faults import (
    PathLike,
    box_fault,
    check_files_exist,
    is_empty,
    log_empty_boxes,
    raise_if_any,
    to_corners,
)

logger = logging.getLogger(__name__)


class CocoSummary(NamedTuple):
    """What a COCO file holds. Classes are in the order of their ids, as Detectron2 numbers them."""

    class_ids: List[int]
    class_names: List[str]
    num_images: int
    num_annotations: int
    num_empty_boxes: int


def check_coco_json(
    json_file: PathLike, image_root: PathLike, for_evaluation: bool = False
) -> CocoSummary:
    """Read a COCO detection file and stop at the first kind of fault that would spoil a run.

    Args:
        json_file: annotations in COCO's instances format.
        image_root: folder that the file names in it start from.
        for_evaluation: whether COCO's evaluation will read the file; it needs more keys.

    Raises:
        FileNotFoundError: the file, the image folder or an image is missing.
        ValueError: the file is not JSON; a list or key is missing; ids are not unique or point
            nowhere; a box is not four numbers, not finite, or has x2 < x1 or y2 < y1.
    """
    data = _read_coco_json(json_file)
    class_ids, class_names = _read_classes(data, json_file)
    images = _check_images(data, json_file, image_root)
    annotations = _get_list(data, "annotations", json_file)
    needed = ["id", "image_id", "category_id", "bbox"]
    _check_keys(annotations, needed, "annotation", json_file)
    if for_evaluation:
        _check_keys(annotations, ["area", "iscrowd"], "annotation", json_file, " to be evaluated")
    _check_unique(annotations, "annotation", json_file)
    known_classes = set(class_ids)
    faults, num_empty = [], 0
    for annotation in annotations:
        place = f"annotation {annotation['id']} of image {annotation['image_id']}"
        image = images.get(annotation["image_id"])
        fault = box_fault(annotation["bbox"], has_corners=False)
        if image is None:
            faults.append(f"{place} belongs to no image of the file")
        elif annotation["category_id"] not in known_classes:
            faults.append(f"{place} has category_id {annotation['category_id']}, not in categories")
        elif annotation.get("ignore", 0):
            faults.append(f'{place} has "ignore", which Detectron2 does not know; use "iscrowd"')
        elif fault:
            faults.append(f"{place} has bbox {annotation['bbox']}, {fault}")
        elif is_empty(to_corners(annotation["bbox"]), image):
            num_empty += 1
    raise_if_any(faults, f"in {json_file}")
    log_empty_boxes(num_empty, json_file, for_evaluation)
    if for_evaluation and any(annotation["id"] == 0 for annotation in annotations):
        logger.warning(
            "%s has an annotation with id 0. COCO's evaluation takes a match with it for none, so "
            "AP comes out too low: count annotation ids from 1.",
            json_file,
        )
    return CocoSummary(class_ids, class_names, len(images), len(annotations), num_empty)


def read_class_names(json_file: PathLike) -> List[str]:
    """Class names of a COCO file in the order of their ids; the errors are `check_coco_json`'s."""
    return _read_classes(_read_coco_json(json_file), json_file)[1]


def count_classes(json_file: PathLike) -> int:
    """How many classes a COCO file has; the errors are `check_coco_json`'s."""
    return len(read_class_names(json_file))


def resolve_num_classes(configured: Optional[int], json_file: PathLike) -> int:
    """Number of classes to train with: the file's, which an explicit configuration must confirm.

    Args:
        configured: what the configuration says; None if it does not say.
        json_file: COCO annotations.

    Raises:
        ValueError: the two numbers differ.
    """
    class_names = read_class_names(json_file)
    check_num_classes(configured, class_names, json_file)
    return len(class_names)


def check_num_classes(configured: Optional[int], class_names: List[str], source: PathLike) -> None:
    """Say how many classes there are; stop if the configuration says another number.

    Raises:
        ValueError: `configured` is neither None nor the number of class names.
    """
    found = len(class_names)
    shown = ", ".join(class_names[:10]) + (", ..." if found > 10 else "")
    if configured is not None and configured != found:
        raise ValueError(
            f"The configuration says num_classes={configured}, but {source} has {found} classes "
            f"({shown}). Set num_classes to {found}, leave it out, or give the right file."
        )
    logger.info("%d classes, from %s: %s.", found, source, shown)


def check_same_classes(
    first: List[str], first_source: PathLike, second: List[str], second_source: PathLike
) -> None:
    """Training and validation must mean the same by class 0, 1, ..., or AP measures nothing.

    Raises:
        ValueError: names or their order differ.
    """
    if first == second:
        return
    if len(first) != len(second):
        difference = f"{len(first)} classes in the one, {len(second)} in the other"
    else:
        place = next(i for i, name in enumerate(first) if name != second[i])
        difference = f"class {place} is {first[place]!r} in the one, {second[place]!r} in the other"
    raise ValueError(
        f"{first_source} and {second_source} have different categories: {difference}. "
        "Both need the same names in the order of their ids."
    )


def _read_coco_json(json_file: PathLike) -> Dict[str, Any]:
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"There is no annotation file {json_file}.")
    with open(json_file, encoding="utf-8") as file:
        try:
            data = json.load(file)
        except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
            raise ValueError(f"{json_file} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise ValueError(f"{json_file} is not a COCO file: it holds a {kind}, not an object.")
    return data


def _get_list(data: Dict[str, Any], key: str, json_file: PathLike) -> List[Dict[str, Any]]:
    items = data.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f'{json_file} is not a COCO file: it needs "{key}", a list of objects.')
    return items


def _read_classes(data: Dict[str, Any], json_file: PathLike) -> Tuple[List[int], List[str]]:
    categories = _get_list(data, "categories", json_file)
    if not categories:
        raise ValueError(f'{json_file} has no classes: its "categories" are empty.')
    _check_keys(categories, ["id", "name"], "category", json_file)
    _check_unique(categories, "category", json_file)
    categories = sorted(categories, key=lambda category: category["id"])
    return [c["id"] for c in categories], [str(c["name"]) for c in categories]


def _check_images(
    data: Dict[str, Any], json_file: PathLike, image_root: PathLike
) -> Dict[Any, Dict[str, Any]]:
    """Images of the file by id, each with its keys and its file."""
    images = _get_list(data, "images", json_file)
    if not images:
        raise ValueError(f'{json_file} has no images: its "images" are empty.')
    _check_keys(images, ["id", "file_name", "height", "width"], "image", json_file)
    _check_unique(images, "image", json_file)
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"There is no image folder {image_root} (for {json_file}).")
    files = [os.path.join(image_root, image["file_name"]) for image in images]
    check_files_exist(files, json_file)
    return {image["id"]: image for image in images}


def _check_keys(
    items: List[Dict[str, Any]], keys: List[str], kind: str, json_file: PathLike, use: str = ""
) -> None:
    for index, item in enumerate(items):
        missing = [key for key in keys if item.get(key) is None]
        if missing:
            names = " and ".join(f'"{key}"' for key in missing)
            name = f"number {index} (from 0)" if "id" in missing else item["id"]
            of_image = f" of image {item['image_id']}" if "image_id" in item else ""
            raise ValueError(f"In {json_file}, {kind} {name}{of_image} needs {names}{use}.")


def _check_unique(items: List[Dict[str, Any]], kind: str, json_file: PathLike) -> None:
    # COCO's ids are whole numbers; Detectron2 and pycocotools do well with names of images too.
    types = (int, str) if kind == "image" else (int,)
    seen = set()
    for item in items:
        if not isinstance(item["id"], types):
            raise ValueError(f"In {json_file}, {kind} id {item['id']!r} is not a whole number.")
        if item["id"] in seen:
            raise ValueError(f"In {json_file}, {kind} id {item['id']} is there more than once.")
        seen.add(item["id"])
