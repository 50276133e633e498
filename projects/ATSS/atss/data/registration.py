"""How do data sets get their names in Detectron2? The toy set, files of one's own, the config's."""

import argparse
import logging
import os
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .coco_json import CocoSummary, check_coco_json, check_num_classes, check_same_classes
from .faults import PathLike
from .toy_shapes import ToyShapesOptions, render_dataset, split_paths

logger = logging.getLogger(__name__)

TOY_SHAPES = "toy_shapes"
OWN_TRAIN, OWN_VAL = "own_train", "own_val"


class Datasets(NamedTuple):
    """What a run trains and evaluates on.

    `train` and `val` are registered names, perhaps none. `class_names` are in the order of the
    class ids; they and `num_classes` are None where a registered set does not tell its classes.
    """

    train: Tuple[str, ...]
    val: Tuple[str, ...]
    class_names: Optional[List[str]]
    num_classes: Optional[int]


def default_root() -> str:
    """Folder of all data sets: $DETECTRON2_DATASETS or ./datasets, as for Detectron2's own."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_toy_shapes(
    root: Optional[PathLike] = None,
    options: Optional[ToyShapesOptions] = None,
    name: str = TOY_SHAPES,
) -> Tuple[str, str]:
    """Register the toy set, rendered first if it is not there yet.

    Args:
        root: the set's own folder; by default the folder `name` in `default_root()`.
        options: what the set contains; by default the fixed set that figures are compared on.
        name: the sets are registered as `name`_train and `name`_val.

    Returns:
        The names of the training and the validation set.

    Raises:
        ValueError: the folder holds something else, or the names mean other files already.
    """
    options = options or ToyShapesOptions()
    root = os.path.join(default_root(), name) if root is None else root
    render_dataset(root, options)
    train, val = (f"{name}_{split}" for split in ("train", "val"))
    class_ids = list(range(1, options.num_classes + 1))
    for registered, split in ((train, "train"), (val, "val")):
        _register(registered, *split_paths(root, split), class_ids, options.class_names)
    return train, val


def register_coco_json(
    name: str, json_file: PathLike, image_root: PathLike, for_evaluation: bool = False
) -> CocoSummary:
    """Register a COCO-format set under a name, after `check_coco_json`, whose errors it shares.

    Raises:
        ValueError: also if the name means other files already.
    """
    summary = check_coco_json(json_file, image_root, for_evaluation)
    _register(name, json_file, image_root, summary.class_ids, summary.class_names)
    logger.info(
        "%s: %d images and %d annotations in %s.",
        name,
        summary.num_images,
        summary.num_annotations,
        json_file,
    )
    return summary


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a tool the four options for data of one's own."""
    group = parser.add_argument_group(
        "own data", "Any COCO-format set; takes the place of the sets in the config."
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
    """Register what the command line, or else the config, asks for; read the number of classes.

    With `--train-json` or `--val-json` those sets take the place of the config's. Else the toy set
    is rendered if the config names it. With `args.eval_only` nothing is asked of a training set.

    Args:
        args: of a parser with `add_dataset_arguments`.
        train, val: names of the data sets in the config.
        num_classes: K if the config sets it explicitly, which the data must confirm; else None.

    Raises:
        FileNotFoundError: an annotation file, image folder or image is missing.
        ValueError: options that belong together are not both given; faulty annotations; training
            and validation differ in their classes; `num_classes` contradicts the data; a name in
            the config is not registered.
    """
    eval_only = getattr(args, "eval_only", False)
    train_files = _file_pair(args, "train")
    val_files = _file_pair(args, "val")
    if not train_files and not val_files:
        train, val = _as_tuple(train), _as_tuple(val)
        return _from_config(() if eval_only else train, val, num_classes)
    if not train_files and not eval_only:
        raise ValueError(
            "--val-json without --train-json: give --train-json and --train-images to train on "
            "your own data, or --eval-only to evaluate."
        )
    if eval_only and not val_files:
        raise ValueError("--eval-only on your own data needs --val-json and --val-images.")
    sources = []
    if train_files:
        sources.append((train_files[0], register_coco_json(OWN_TRAIN, *train_files).class_names))
    if val_files:
        summary = register_coco_json(OWN_VAL, *val_files, for_evaluation=True)
        sources.append((val_files[0], summary.class_names))
    else:
        logger.warning("No --val-json: nothing will be evaluated.")
    return Datasets(
        (OWN_TRAIN,) if train_files else (),
        (OWN_VAL,) if val_files else (),
        *_agree_on_classes(sources, num_classes),
    )


def _register(
    name: str,
    json_file: PathLike,
    image_root: PathLike,
    class_ids: List[int],
    class_names: List[str],
) -> None:
    """Register a set; doing so again with the same files and classes changes nothing."""
    files = {"json_file": os.path.abspath(json_file), "image_root": os.path.abspath(image_root)}
    # Detectron2 sets these when it loads the file; an evaluator may need them before.
    ids = {class_id: index for index, class_id in enumerate(class_ids)}
    classes = {"thing_classes": class_names, "thing_dataset_id_to_contiguous_id": ids}
    if name not in DatasetCatalog:
        register_coco_instances(name, classes, **files)
        return
    metadata = MetadataCatalog.get(name)
    known = {key: metadata.get(key) for key in files}
    known_names = metadata.get("thing_classes", class_names)
    if known != files or known_names != class_names:
        raise ValueError(
            f"Data set {name} is registered already, as {known} with the classes {known_names}; it "
            f"cannot become {files} with {class_names}. Choose another name, or remove it from "
            "DatasetCatalog and MetadataCatalog first."
        )
    metadata.set(**classes)


def _file_pair(args: argparse.Namespace, split: str) -> Optional[Tuple[str, str]]:
    json_file = getattr(args, f"{split}_json", None)
    image_root = getattr(args, f"{split}_images", None)
    if bool(json_file) != bool(image_root):
        given, needed = ("json", "images") if json_file else ("images", "json")
        raise ValueError(f"--{split}-{given} needs --{split}-{needed} with it.")
    return (json_file, image_root) if json_file else None


def _from_config(
    train: Tuple[str, ...], val: Tuple[str, ...], num_classes: Optional[int]
) -> Datasets:
    names = (*train, *val)
    unknown = [name for name in names if name not in DatasetCatalog]
    if any(name in (f"{TOY_SHAPES}_train", f"{TOY_SHAPES}_val") for name in unknown):
        unknown = [name for name in unknown if name not in register_toy_shapes()]
    if unknown:
        raise ValueError(
            f"Data set {', '.join(unknown)} is not registered. Give files of your own by "
            f"--train-json and --train-images, or one of: {', '.join(sorted(DatasetCatalog))}."
        )
    for name in names:
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file and "://" not in json_file and not os.path.isfile(json_file):
            raise FileNotFoundError(
                f"Data set {name} needs {json_file}, which is missing. Put the data there, or set "
                "DETECTRON2_DATASETS to the folder of your data sets."
            )
    sources = [(name, MetadataCatalog.get(name).get("thing_classes")) for name in names]
    sources = [(name, list(classes)) for name, classes in sources if classes]
    return Datasets(train, val, *_agree_on_classes(sources, num_classes))


def _agree_on_classes(
    sources: List[Tuple[PathLike, List[str]]], num_classes: Optional[int]
) -> Tuple[Optional[List[str]], Optional[int]]:
    """The classes that all sources have in common, and their number."""
    if not sources:
        return None, num_classes
    first_source, class_names = sources[0]
    for source, others in sources[1:]:
        check_same_classes(class_names, first_source, others, source)
    check_num_classes(num_classes, class_names, first_source)
    return class_names, len(class_names)


def _as_tuple(names: Union[str, Sequence[str]]) -> Tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
