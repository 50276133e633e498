"""Checks of image files and annotations that all formats of a data set share."""

import logging
import math
import numbers
import os
from typing import Any, Dict, Iterable, List, Union

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]

_NUM_SHOWN = 3  # problems that a message names; the others are counted
_EMPTY_SIDE = 1e-5  # pixels; Detectron2's filter_empty_instances drops boxes as thin as this


def check_files_exist(files: Iterable[str], source: PathLike) -> None:
    """Stop at missing images (FileNotFoundError), naming the first few."""
    # Names such as s3://... are for Detectron2's PathManager to fetch.
    missing = [file for file in files if "://" not in file and not os.path.isfile(file)]
    if missing:
        raise FileNotFoundError(
            f"Image files of {source} are missing ({len(missing)}): {_shorten(missing)}."
        )


def is_empty_box(box: Any, has_corners: bool, image: Dict[str, Any]) -> bool:
    """Whether a box has no area in its image.

    Args:
        box: x1, y1, x2, y2 or x, y, width, height, in pixels.
        has_corners: whether it is the former.
        image: its "width" and "height", if known: Detectron2 clips boxes, then drops empty ones.

    Raises:
        ValueError: it is no box. The message is a clause about it.
    """
    try:
        values = list(box)
    except TypeError:
        values = []
    if len(values) != 4 or not all(isinstance(value, numbers.Real) for value in values):
        raise ValueError("which is not four numbers")
    if not all(math.isfinite(value) for value in values):
        raise ValueError("which is not finite")
    x1, y1, x2, y2 = values
    if not has_corners:
        x2, y2 = x1 + x2, y1 + y2
    if x2 < x1 or y2 < y1:
        raise ValueError("which has x2 < x1 or y2 < y1 (a negative size)")
    width = min(x2, image.get("width", math.inf)) - max(x1, 0)
    height = min(y2, image.get("height", math.inf)) - max(y1, 0)
    return width <= _EMPTY_SIDE or height <= _EMPTY_SIDE


def raise_if_any(problems: List[str], where: str) -> None:
    """Stop with a ValueError if there are problems, naming the first few."""
    if problems:
        count = f" ({len(problems)} such problems)" if len(problems) > 1 else ""
        raise ValueError(f"Bad annotations {where}{count}: {_shorten(problems)}.")


def log_empty_boxes(number: int, source: PathLike, consequence: str = "are dropped") -> None:
    """Count the boxes without area in one line."""
    if number:
        logger.warning("%s: %d boxes without area in their image %s.", source, number, consequence)


def _shorten(items: List[str]) -> str:
    """The first few items, and how many more there are."""
    more = f"; and {len(items) - _NUM_SHOWN} more" if len(items) > _NUM_SHOWN else ""
    return "; ".join(items[:_NUM_SHOWN]) + more
