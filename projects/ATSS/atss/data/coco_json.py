"""Checks of COCO annotation files before a training or an evaluation.

Detectron2 loads most faulty files without a message, or stops with a bare assertion hours later.
Boxes without area are no error: training drops them, and one log line counts them.
"""

import json
import logging
import os
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set

from .annotations import PathLike, box_flaw, check_image_files, log_flaws, raise_if_any

logger = logging.getLogger(__name__)

Record = Dict[str, Any]  # a category, an image or an annotation


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
    """Read a COCO detection file; stop at the first kind of problem that would spoil a run.

    Args:
        json_file: annotations in COCO's instances format.
        image_root: folder that the file names in it are relative to.
        for_evaluation: whether COCO's evaluation will read the file; it needs more keys.

    Raises:
        FileNotFoundError: the file, the image folder or an image is missing.
        ValueError: the file is not JSON; a list or key is missing; ids are not unique or refer to
            nothing; see `check_image_files`, `box_flaw`. File, image and annotation are named.
    """
    data = _read_json(json_file)
    classes = _read_records(data, "categories", "category", ["name"], json_file)
    if not classes:
        raise ValueError(f'{json_file} has no classes: its "categories" are empty.')
    images = _read_records(data, "images", "image", ["file_name", "height", "width"], json_file)
    if not images:
        raise ValueError(f'{json_file} has no images: its "images" are empty.')
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"There is no image folder {image_root} (for {json_file}).")
    files = [{**i, "file_name": os.path.join(image_root, i["file_name"])} for i in images]
    check_image_files(files, json_file)
    keys = ["image_id", "category_id", "bbox"]
    annotations = _read_records(data, "annotations", "annotation", keys, json_file)
    if for_evaluation:
        _check_keys(annotations, "annotation", ["area", "iscrowd"], json_file, " to be evaluated")

    classes.sort(key=lambda record: record["id"])
    class_ids = [record["id"] for record in classes]
    known_classes = set(class_ids)
    images_by_id = {image["id"]: image for image in images}
    problems, flaws = [], Counter()
    for annotation in annotations:
        try:
            flaws[_flaw(annotation, images_by_id, known_classes)] += 1
        except ValueError as error:
            place = f"annotation {annotation['id']} of image {annotation['image_id']}"
            problems.append(f"{place} {error}")
    raise_if_any(problems, f"in {json_file}")
    if for_evaluation:  # what is trained on is counted where it is loaded
        log_flaws(flaws, json_file, for_evaluation=True)
    if for_evaluation and any(annotation["id"] == 0 for annotation in annotations):
        logger.warning(
            "%s has an annotation with id 0. COCO's evaluation counts a match with it as no match, "
            "so AP comes out too low: count annotation ids from 1.",
            json_file,
        )
    class_names = [str(record["name"]) for record in classes]
    return CocoSummary(class_ids, class_names, len(images), len(annotations), flaws["empty"])


def _read_json(json_file: PathLike) -> Dict[str, Any]:
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"There is no annotation file {json_file}.")
    with open(json_file, encoding="utf-8") as file:
        try:
            if file.read(1) == "\ufeff":
                raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
            file.seek(0)
            data = json.load(file)
        except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
            raise ValueError(f"{json_file} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        found = type(data).__name__
        raise ValueError(f"{json_file} is not a COCO file: it holds a {found}, not an object.")
    return data


def _read_records(
    data: Dict[str, Any], name: str, kind: str, keys: Sequence[str], json_file: PathLike
) -> List[Record]:
    """One of the lists of a COCO file; all records have these keys and a unique id."""
    records = data.get(name)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f'{json_file} is not a COCO file: it needs "{name}", a list of objects.')
    _check_keys(records, kind, ["id", *keys], json_file)
    # COCO's ids are whole numbers; for images Detectron2 and pycocotools accept names too.
    types = (int, str) if kind == "image" else (int,)
    seen = set()
    for record in records:
        if not isinstance(record["id"], types):
            raise ValueError(f"In {json_file}, {kind} id {record['id']!r} is not a whole number.")
        if record["id"] in seen:
            raise ValueError(f"In {json_file}, {kind} id {record['id']} occurs more than once.")
        seen.add(record["id"])
    return records


def _check_keys(
    records: List[Record], kind: str, keys: Sequence[str], json_file: PathLike, use: str = ""
) -> None:
    for index, record in enumerate(records):
        missing = [key for key in keys if record.get(key) is None]
        if missing:
            names = " and ".join(f'"{key}"' for key in missing)
            name = f"number {index} (from 0)" if "id" in missing else record["id"]
            of_image = f" of image {record['image_id']}" if "image_id" in record else ""
            raise ValueError(f"In {json_file}, {kind} {name}{of_image} needs {names}{use}.")


def _flaw(annotation: Record, images: Dict[Any, Record], class_ids: Set[int]) -> Optional[str]:
    """What `box_flaw` says; a ValueError says what is wrong with the annotation."""
    image, box = images.get(annotation["image_id"]), annotation["bbox"]
    if image is None:
        raise ValueError("belongs to no image of the file")
    if annotation["category_id"] not in class_ids:
        raise ValueError(f"has category_id {annotation['category_id']}, not in categories")
    if annotation.get("ignore", 0):
        raise ValueError('has "ignore", which Detectron2 does not know; use "iscrowd"')
    try:
        return box_flaw(box, has_corners=False, image=image)
    except ValueError as error:
        raise ValueError(f"has bbox {box}, {error}") from None
