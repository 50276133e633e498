"""Checks of image files and annotations that all formats of a data set share."""

import logging
import math
import numbers
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Optional, Sequence, Union

from PIL import Image

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]

_NUM_SHOWN = 3  # problems that a message names; the others are counted
_EXIF_ORIENTATION = 0x0112
_EMPTY_SIDE = 1e-5  # pixels; Detectron2's filter_empty_instances drops boxes as thin as this


def check_image_files(images: Sequence[Dict[str, Any]], source: PathLike) -> None:
    """Check files by their headers, in which type, size and rotation stand.

    Args:
        images: with "file_name" (others are left out), and "width" and "height" if known.
        source: file or data set that names them.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a file is no image, has 16 bits a channel, or is of another size.
    """
    # Names such as s3://... are for Detectron2's PathManager to fetch.
    images = [image for image in images if "://" not in image.get("file_name", "://")]
    missing = [file for file in (i["file_name"] for i in images) if not os.path.isfile(file)]
    if missing:
        raise FileNotFoundError(
            f"Image files of {source} are missing ({len(missing)}): {_shorten(missing)}."
        )
    with ThreadPoolExecutor(8) as pool:
        problems = [problem for problem in pool.map(_header_problem, images) if problem]
    raise_if_any(problems, f"in {source}", "images")


def _header_problem(image: Dict[str, Any]) -> Optional[str]:
    """A clause with the cure, None if all is well."""
    file = image["file_name"]
    try:
        with Image.open(file) as opened:
            size, mode = opened.size, opened.mode
            # Of a PNG without the data in its header, Pillow would decode the whole image.
            has_exif = opened.format != "PNG" or "exif" in opened.info
            orientation = opened.getexif().get(_EXIF_ORIENTATION, 1) if has_exif else 1
            is_rotated = orientation >= 5  # by a quarter turn
    except (OSError, SyntaxError) as error:
        return f"{file} cannot be read ({error}): replace it, or remove it from the annotations"
    if mode[:1] in ("I", "F"):
        return f"{file} has more than 8 bits a channel (mode {mode}): convert it to 8 bits"
    wanted = image.get("width", size[is_rotated]), image.get("height", size[not is_rotated])
    if wanted == (size[::-1] if is_rotated else size):
        return None
    if is_rotated and wanted == size:
        return (
            f"{file} has a rotation in its EXIF data, which Detectron2 applies; the annotations "
            f"give the size before it, {wanted[0]}x{wanted[1]}: remove the EXIF orientation from "
            "the file if the boxes were drawn without it, else swap width and height"
        )
    found = f"{size[is_rotated]}x{size[not is_rotated]}"
    return f"{file} is {found}, the annotations say {wanted[0]}x{wanted[1]}: correct either"


def box_flaw(box: Any, has_corners: bool, image: Dict[str, Any]) -> Optional[str]:
    """What is unusual about a box, though no error.

    Args:
        box: x1, y1, x2, y2 or x, y, width, height, in pixels.
        has_corners: whether it is the former.
        image: its "width" and "height", if known: Detectron2 clips boxes, then drops empty ones.

    Returns:
        "empty" without area in its image, "outside" if it reaches out of the image by more than a
        pixel, else None.

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
    width, height = image.get("width", math.inf), image.get("height", math.inf)
    if min(min(x2, width) - max(x1, 0), min(y2, height) - max(y1, 0)) <= _EMPTY_SIDE:
        return "empty"
    return "outside" if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1 else None


def raise_if_any(problems: Sequence[str], where: str, things: str = "annotations") -> None:
    """Stop with a ValueError if there are problems, naming the first few."""
    if problems:
        count = f" ({len(problems)} such problems)" if len(problems) > 1 else ""
        raise ValueError(f"Bad {things} {where}{count}: {_shorten(problems)}.")


def log_flaws(
    flaws: "Counter[Optional[str]]", source: PathLike, for_evaluation: bool = False
) -> None:
    """Count the boxes of each of `box_flaw`'s kinds in one line."""
    if flaws["empty"]:
        effect = "count as missed objects in the evaluation" if for_evaluation else "are dropped"
        logger.warning(
            "%s: %d boxes without area in their image %s.", source, flaws["empty"], effect
        )
    if flaws["outside"]:
        logger.warning(
            "%s: %d boxes reach out of their image. Training clips them to it, COCO's evaluation "
            "compares with them as they are.",
            source,
            flaws["outside"],
        )


def _shorten(items: Sequence[str]) -> str:
    """The first few items, and how many more there are."""
    more = f"; and {len(items) - _NUM_SHOWN} more" if len(items) > _NUM_SHOWN else ""
    return "; ".join(items[:_NUM_SHOWN]) + more
