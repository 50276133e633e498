"""Registration of data sets with Detectron2: the toy set, COCO files, what a tool was asked for."""

import argparse
import logging
import os
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .annotations import PathLike
from .classes import common_classes
from .coco_json import CocoSummary, check_coco_json
from .toy_shapes import ToyShapesOptions, render_dataset, split_paths

logger = logging.getLogger(__name__)

TOY_SHAPES = "toy_shapes"

Files = Tuple[str, str]  # annotation file, image folder


class Datasets(NamedTuple):
    """What a run trains and evaluates on.

    `train` and `val` are registered names, perhaps none. `class_names` are in the order of the
    class ids, None where no registered set says its classes.
    """

    train: Tuple[str, ...]
    val: Tuple[str, ...]
    class_names: Optional[List[str]]


def register_toy_shapes(
    root: Optional[PathLike] = None,
    options: Optional[ToyShapesOptions] = None,
    name: str = TOY_SHAPES,
) -> Tuple[str, str]:
    """Register the toy set, which is rendered first if there is none with these options yet.

    Args:
        root: folder of toy sets, see `render_dataset`; by default "toy_shapes" where Detectron2
            has its own sets, in $DETECTRON2_DATASETS or ./datasets.
        options: what the set contains; by default the fixed set that figures are compared on.
        name: the sets are registered as `name`_train and `name`_val.

    Returns:
        The names of the training and the validation set.

    Raises:
        ValueError: the names already mean other files.
    """
    options = options or ToyShapesOptions()
    if root is None:
        root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), TOY_SHAPES)
    folder = render_dataset(root, options)
    class_ids = list(range(1, options.num_classes + 1))
    names = f"{name}_train", f"{name}_val"
    for set_name, split in zip(names, ("train", "val")):
        if _is_deferred(set_name):
            DatasetCatalog.pop(set_name)
        _register(set_name, *split_paths(folder, split), class_ids, options.class_names)
    return names


def defer_toy_shapes() -> None:
    """Register the default toy set, which is rendered when it is first loaded.

    So Detectron2's own tools find it wherever `atss` is imported.
    """
    for name in (f"{TOY_SHAPES}_train", f"{TOY_SHAPES}_val"):
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(_render_and_load, name))


def _render_and_load(name: str) -> List[Dict[str, Any]]:
    register_toy_shapes()
    return DatasetCatalog.get(name)


def _is_deferred(name: str) -> bool:
    loader = DatasetCatalog.data.get(name)  # `get` would load the set
    return isinstance(loader, partial) and loader.func is _render_and_load


def register_coco_json(
    name: str, json_file: PathLike, image_root: PathLike, for_evaluation: bool = False
) -> CocoSummary:
    """Register a COCO-format set under a name, after `check_coco_json`, whose errors it shares.

    Raises:
        ValueError: also if the name already means other files.
    """
    summary = check_coco_json(json_file, image_root, for_evaluation)
    _register(name, json_file, image_root, summary.class_ids, summary.class_names)
    counts = (summary.num_images, summary.num_annotations)
    logger.info("%s: %d images and %d annotations in %s.", name, *counts, json_file)
    return summary


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a tool the four options for your data."""
    group = parser.add_argument_group(
        "your data", "Any COCO-format set; used in place of the sets in the config."
    )
    for split, purpose in (("train", "train on"), ("val", "evaluate on")):
        group.add_argument(f"--{split}-json", metavar="FILE", help=f"COCO annotations to {purpose}")
        group.add_argument(
            f"--{split}-images", metavar="FOLDER", help=f"folder of the images of --{split}-json"
        )


def register_from_arguments(
    args: argparse.Namespace,
    train: Union[str, Sequence[str]] = (),
    val: Union[str, Sequence[str]] = (),
    num_classes: Optional[int] = None,
) -> Datasets:
    """Register what the command line, or else the config, asks for; find the classes.

    The sets of `--train-json` and `--val-json`, own_train and own_val, replace all sets of the
    config. Without them, the toy set is rendered if the config names it. With `args.eval_only` no
    training set is needed.

    Args:
        args: of a parser with `add_dataset_arguments`.
        train, val: names of the data sets in the config.
        num_classes: K if the config sets it explicitly, which the data must confirm; else None.

    Raises:
        FileNotFoundError: an annotation file, image folder or image is missing.
        ValueError: of two options that belong together one is missing; annotations are faulty;
            training and validation differ in their classes; `num_classes` contradicts the data; a
            name in the config is not registered.
    """
    eval_only = getattr(args, "eval_only", False)
    files = {split: _files_of(args, split) for split in ("train", "val")}
    if any(files.values()):
        return _register_files(files, num_classes, eval_only)
    train, val = ((names,) if isinstance(names, str) else tuple(names) for names in (train, val))
    return _register_names(() if eval_only else train, val, num_classes)


def _register(
    name: str,
    json_file: PathLike,
    image_root: PathLike,
    class_ids: List[int],
    class_names: List[str],
) -> None:
    """Register a set; repeating this with the same files and classes changes nothing."""
    files = {"json_file": os.path.abspath(json_file), "image_root": os.path.abspath(image_root)}
    ids = {class_id: index for index, class_id in enumerate(class_ids)}
    classes = {"thing_classes": class_names, "thing_dataset_id_to_contiguous_id": ids}
    metadata = MetadataCatalog.get(name)
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, partial(_load, files, ids))
        metadata.set(evaluator_type="coco", **files, **classes)
        return
    known = {key: metadata.get(key) for key in files}
    known_names = metadata.get("thing_classes", class_names)
    if known != files or known_names != class_names:
        raise ValueError(
            f"Data set {name} is already registered as {known} with the classes {known_names}; it "
            f"cannot become {files} with {class_names}. Choose another name, or remove it from "
            "DatasetCatalog and MetadataCatalog first."
        )
    metadata.set(**classes)


def _load(files: Dict[str, str], ids: Dict[int, int]) -> List[Dict[str, Any]]:
    """Detectron2's dicts. Given a name, its reader would set class names that may be numbers."""
    dataset_dicts = load_coco_json(**files)
    for image in dataset_dicts:
        for annotation in image["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]
    return dataset_dicts


def _files_of(args: argparse.Namespace, split: str) -> Optional[Files]:
    json_file = getattr(args, f"{split}_json", None)
    image_root = getattr(args, f"{split}_images", None)
    if bool(json_file) != bool(image_root):
        given, needed = ("json", "images") if json_file else ("images", "json")
        raise ValueError(f"--{split}-{given} needs --{split}-{needed} with it.")
    return (json_file, image_root) if json_file else None


def _register_files(
    files: Dict[str, Optional[Files]], num_classes: Optional[int], eval_only: bool
) -> Datasets:
    if not files["train"] and not eval_only:
        raise ValueError(
            "--val-json without --train-json: give --train-json and --train-images to train on "
            "your data, or --eval-only to evaluate."
        )
    if not files["val"] and eval_only:
        raise ValueError("--eval-only on your data needs --val-json and --val-images.")
    names: Dict[str, Tuple[str, ...]] = {"train": (), "val": ()}
    sources = []
    for split, paths in files.items():
        if paths:
            names[split] = (f"own_{split}",)
            summary = register_coco_json(f"own_{split}", *paths, for_evaluation=split == "val")
            sources.append((paths[0], summary.class_names))
    if not files["val"]:
        logger.warning("No --val-json: nothing will be evaluated.")
    return Datasets(**names, class_names=common_classes(sources, num_classes))


def _register_names(
    train: Tuple[str, ...], val: Tuple[str, ...], num_classes: Optional[int]
) -> Datasets:
    names = (*train, *val)
    if any(_is_deferred(name) for name in names):
        register_toy_shapes()
    unknown = [name for name in names if name not in DatasetCatalog]
    if unknown:
        raise ValueError(
            f"Data set {', '.join(unknown)} is not registered. Give your files with --train-json "
            f"and --train-images, or one of: {', '.join(sorted(DatasetCatalog))}."
        )
    sources = []
    for name in names:
        metadata = MetadataCatalog.get(name)
        json_file, class_names = metadata.get("json_file"), metadata.get("thing_classes")
        if json_file and "://" not in json_file and not os.path.isfile(json_file):
            raise FileNotFoundError(
                f"Data set {name} needs {json_file}, which is missing. Put the data there, or set "
                "DETECTRON2_DATASETS to the folder of your data sets."
            )
        if class_names:
            sources.append((name, list(class_names)))
    return Datasets(train, val, common_classes(sources, num_classes))
