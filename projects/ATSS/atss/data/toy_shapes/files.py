"""Toy sets as files: PNG images and COCO JSON, in a folder named after the options."""

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple, Union

import cv2

from .images import ToyObject, ToyShapesOptions, render_image
from .outlines import polygon_area

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
RENDERER_VERSION = 1  # raise it when the same options give other files: sets get new folders then
# Noise hardly compresses; the fastest setting gives the smallest files here.
_PNG_SETTINGS = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY),
)


class SplitPaths(NamedTuple):
    """Where one split of a set lies."""

    json_file: Path
    image_root: Path


def split_paths(folder: Union[str, os.PathLike], split: str) -> SplitPaths:
    """Annotations and images of "train" or "val" in a folder that `render_dataset` returned."""
    return SplitPaths(Path(folder) / "annotations" / f"{split}.json", Path(folder) / split)


def render_dataset(root: Union[str, os.PathLike], options: ToyShapesOptions) -> Path:
    """Folder of the toy set with these options; the set is rendered first if there is none yet.

    It is rendered in a temporary folder, which is renamed when the set is complete. So a folder
    with the final name is a whole set: an interrupted call leaves a temporary folder at most, and
    of several processes that render one set, the first to finish provides it for all.

    Args:
        root: folder of toy sets. Each set has its own folder there, named after a hash of its
            options, with `train/`, `val/` (PNG) and `annotations/` (COCO JSON, which holds the
            options and seeds under "info").
        options: what the set contains.

    Raises:
        OSError: a file cannot be written.
    """
    root = Path(root).expanduser().resolve()
    made_from = json.dumps(_info(options), sort_keys=True)
    folder = root / hashlib.sha256(made_from.encode()).hexdigest()[:12]
    if folder.is_dir():  # before anything is written: it may be a read-only place
        logger.info("Toy shapes in %s are used as they are.", folder)
        return folder
    logger.info("Rendering toy shapes into %s.", folder)
    start = time.perf_counter()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rendering-", dir=root) as temporary:
        complete = Path(temporary) / "set"  # the temporary folder itself is for this user only
        for split in SPLITS:
            _write_split(complete, split, options)
        try:
            os.rename(complete, folder)
        except OSError:
            if not folder.is_dir():
                raise
            logger.info("Another process has rendered the toy shapes in %s.", folder)
            return folder
    number, seconds = options.num_train + options.num_val, time.perf_counter() - start
    logger.info("Rendered %d images of toy shapes in %.1f s.", number, seconds)
    return folder


def _info(options: ToyShapesOptions) -> Dict[str, Any]:
    """All that the files of a set follow from."""
    return {
        "description": "Toy shapes, a rendered detection set (atss.data.toy_shapes)",
        "version": RENDERER_VERSION,
        "options": dataclasses.asdict(options),
    }


def _write_split(folder: Path, split: str, options: ToyShapesOptions) -> None:
    json_file, image_root = split_paths(folder, split)
    image_root.mkdir(parents=True)
    json_file.parent.mkdir(exist_ok=True)

    def write_image(index: int) -> Tuple[Dict[str, Any], List[ToyObject]]:
        pixels, objects = render_image(options, split, index)
        name = f"{index + 1:06d}.png"
        if not cv2.imwrite(str(image_root / name), pixels, _PNG_SETTINGS):
            raise OSError(f"OpenCV could not write {image_root / name}.")
        side = options.image_size
        return {"id": index + 1, "file_name": name, "width": side, "height": side}, objects

    # NumPy and OpenCV release the interpreter's lock while they compute. Each image has its own
    # random generator, so the number of threads does not change the result.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        written = list(pool.map(write_image, range(getattr(options, f"num_{split}"))))
    annotated = [(image["id"], item) for image, objects in written for item in objects]
    content = {
        "info": {**_info(options), "split": split, "seed": getattr(options, f"{split}_seed")},
        "categories": [{"id": i, "name": n} for i, n in enumerate(options.class_names, start=1)],
        "images": [image for image, _ in written],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": item.class_id + 1,
                "bbox": list(item.box),
                "area": polygon_area(item.polygon),
                "segmentation": [item.polygon.ravel().tolist()],
                "iscrowd": 0,
            }
            for number, (image_id, item) in enumerate(annotated, start=1)
        ],
    }
    json_file.write_text(json.dumps(content))
