"""How does a toy set become files? As PNG images, COCO JSON and a manifest.

The manifest says what the set was made from and has a checksum of each file, so that an intact set
is reused and any other is made again.
"""

import contextlib
import dataclasses
import glob
import json
import logging
import os
import shutil
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import cv2

from .outlines import polygon_area
from .scenes import ToyObject, ToyShapesOptions, render_scene

try:
    import fcntl
except ImportError:  # Windows: two processes that start at once both render, and one copy is kept
    fcntl = None

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
MANIFEST = "toy_shapes.json"
RENDERER_VERSION = 1  # raise it when the same options give other files, so that old sets are redone


class SplitPaths(NamedTuple):
    """Where one split of a set lies."""

    json_file: Path
    image_root: Path


def split_paths(root: Union[str, os.PathLike], split: str) -> SplitPaths:
    """Where `render_dataset` puts the annotations and images of "train" or "val" below its root."""
    return SplitPaths(Path(root) / "annotations" / f"{split}.json", Path(root) / split)


def render_dataset(root: Union[str, os.PathLike], options: ToyShapesOptions) -> bool:
    """Make sure that a folder holds the toy set with these options; an intact one is left as it is.

    The set is rendered beside the folder and moved there when complete, so an interrupted call
    leaves nothing that looks like a set; calls from several processes wait for each other.

    Args:
        root: the set's own folder: `train/`, `val/` (PNG), `annotations/` (COCO JSON, with the
            options and seeds under "info") and a manifest with the checksum of each file.

    Returns:
        Whether the set was rendered; False if it was already there.

    Raises:
        ValueError: the folder holds something that is not a toy set; nothing is deleted then.
    """
    root = Path(os.path.realpath(os.path.expanduser(root)))
    if find_fault(root, options) is None:  # before anything is written: it may be a read-only place
        logger.info("Toy shapes in %s are complete and used as they are.", root)
        return False
    root.parent.mkdir(parents=True, exist_ok=True)
    with _locked(root) as is_locked:
        fault = find_fault(root, options)
        if fault is None:
            logger.info("Another process has rendered the toy shapes in %s.", root)
            return False
        _check_replaceable(root)
        if is_locked:
            _remove_leftovers(root)
        logger.info("Rendering toy shapes into %s: %s.", root, fault)
        start = time.perf_counter()
        partial = root.with_name(f".{root.name}.{uuid.uuid4().hex}.partial")
        try:
            _write_dataset(partial, options)
            _publish(partial, root, options)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        number, seconds = options.num_train + options.num_val, time.perf_counter() - start
        logger.info("Rendered %d images of toy shapes in %.1f s.", number, seconds)
        return True


def find_fault(root: Union[str, os.PathLike], options: ToyShapesOptions) -> Optional[str]:
    """Why a folder cannot be used as the toy set with these options, in words; None if it can."""
    manifest_file = Path(root) / MANIFEST
    if not manifest_file.exists():
        return "there is no set yet"
    try:
        manifest = json.loads(manifest_file.read_text())
        checksums = dict(manifest.pop("checksums"))
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} of the set there is damaged"
    if manifest != _describe(options):
        return "the set there was made with other options or by another version"
    for name, checksum in checksums.items():
        try:
            damaged = _checksum(Path(root) / name) != checksum
        except OSError:
            return f"{name} of the set there is missing"
        if damaged:
            return f"{name} of the set there is damaged"
    return None


def _describe(options: ToyShapesOptions) -> Dict[str, Any]:
    return {
        "description": "Toy shapes, a rendered detection set (atss.toy_shapes)",
        "version": RENDERER_VERSION,
        "options": dataclasses.asdict(options),
    }


def _checksum(file: Path) -> int:
    return zlib.crc32(file.read_bytes())


def _check_replaceable(root: Path) -> None:
    """Refuse to replace a folder that somebody filled with something else."""
    if root.exists() and not (root / MANIFEST).exists() and not _is_empty_folder(root):
        raise ValueError(
            f"{root} exists and is no toy set (it has no {MANIFEST}), so it will not be replaced. "
            "Give another root for the toy set, or delete it yourself."
        )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[bool]:
    """Hold a lock on a set's folder; gives False where the system has no such locks."""
    if fcntl is None:
        yield False
        return
    with open(root.with_name(f".{root.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go of it when the file is closed
            is_locked = True
        except OSError:  # some network file systems
            is_locked = False
        yield is_locked


def _remove_leftovers(root: Path) -> None:
    """Delete what killed processes left; only with the lock held is nobody at work there."""
    for path in root.parent.glob(f".{glob.escape(root.name)}.*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _publish(partial: Path, root: Path, options: ToyShapesOptions) -> None:
    """Move a complete set to its place, which a faulty one may still take up."""
    if root.exists():
        if find_fault(root, options) is None:  # without a lock another process may be faster
            return
        old = root.with_name(f".{root.name}.{uuid.uuid4().hex}.partial")
        os.rename(root, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(partial, root)
    except OSError:  # or faster still
        if find_fault(root, options) is not None:
            raise


def _write_dataset(root: Path, options: ToyShapesOptions) -> None:
    for split in SPLITS:
        paths = split_paths(root, split)
        paths.image_root.mkdir(parents=True)
        paths.json_file.parent.mkdir(exist_ok=True)
        paths.json_file.write_text(json.dumps(_render_split(paths.image_root, split, options)))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    checksums = {path.relative_to(root).as_posix(): _checksum(path) for path in files}
    (root / MANIFEST).write_text(json.dumps({**_describe(options), "checksums": checksums}))


def _render_split(image_root: Path, split: str, options: ToyShapesOptions) -> Dict[str, Any]:
    """Write the images of a split and return its annotations, as COCO has them."""

    def render(index: int) -> Tuple[Dict[str, Any], List[ToyObject]]:
        image, objects = render_scene(options, split, index)
        name = f"{index + 1:06d}.png"
        # Noise hardly compresses; the fastest setting gives the smallest files here.
        strategy = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
        settings = [cv2.IMWRITE_PNG_COMPRESSION, 1, *strategy]
        if not cv2.imwrite(str(image_root / name), image, settings):
            raise OSError(f"OpenCV could not write {image_root / name}.")
        side = options.image_size
        return {"id": index + 1, "file_name": name, "width": side, "height": side}, objects

    # NumPy and OpenCV let go of the interpreter while they compute. Each image has a random
    # generator of its own, so the number of threads does not change the result.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        rendered = list(pool.map(render, range(getattr(options, f"num_{split}"))))
    annotations = []
    for image, objects in rendered:
        for toy_object in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": toy_object.class_id + 1,
                    "bbox": list(toy_object.box),
                    "area": polygon_area(toy_object.polygon),
                    "segmentation": [toy_object.polygon.ravel().tolist()],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(options.class_names, start=1)]
    return {
        "info": {**_describe(options), "split": split, "seed": getattr(options, f"{split}_seed")},
        "categories": categories,
        "images": [image for image, _ in rendered],
        "annotations": annotations,
    }
