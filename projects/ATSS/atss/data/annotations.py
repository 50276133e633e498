"""Checks of image files and annotations that all formats of a data set share."""

import logging
import math
import numbers
import os
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

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


def box_problem(box: Any, has_corners: bool) -> Optional[str]:
    """What is wrong with a box, x1, y1, x2, y2 or x, y, width, height; None if nothing."""
    try:
        values = list(box)
    except TypeError:
        values = []
    if len(values) != 4 or not all(isinstance(value, numbers.Real) for value in values):
        return "which is not four numbers"
    if not all(math.isfinite(value) for value in values):
        return "which is not finite"
    x1, y1, x2, y2 = values if has_corners else to_corners(values)
    return "which has x2 < x1 or y2 < y1 (a negative size)" if x2 < x1 or y2 < y1 else None


def to_corners(box: Sequence[float]) -> Tuple[float, float, float, float]:
    """x, y, width, height -> x1, y1, x2, y2."""
    x, y, width, height = box
    return x, y, x + width, y + height


def is_empty(corners: Sequence[float], image: Dict[str, Any]) -> bool:
    """Whether a box has no area in its image, to which Detectron2 clips boxes before it looks."""
    x1, y1, x2, y2 = corners
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
