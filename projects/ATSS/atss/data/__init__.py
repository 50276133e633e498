"""Data sets: the toy set, COCO files, and checks of what is trained on.

A training tool needs a few lines, for any data::

    add_dataset_arguments(parser)
    ...
    data = register_from_arguments(args, train_names, val_names)  # names, classes
    ...
    dataset_dicts = load_dataset_dicts(data.train, len(data.class_names))  # checked
"""

from .classes import common_classes
from .coco_json import CocoSummary, check_coco_json
from .dataset_dicts import check_dataset_dicts, load_dataset_dicts
from .loader import TrainLoader, build_train_loader
from .mapper import NamingMapper
from .registration import (
    Datasets,
    add_dataset_arguments,
    defer_toy_shapes,
    register_coco_json,
    register_from_arguments,
    register_toy_shapes,
)
from .toy_shapes import ToyShapesOptions

__all__ = [
    "CocoSummary",
    "Datasets",
    "NamingMapper",
    "ToyShapesOptions",
    "TrainLoader",
    "add_dataset_arguments",
    "build_train_loader",
    "check_coco_json",
    "check_dataset_dicts",
    "common_classes",
    "defer_toy_shapes",
    "load_dataset_dicts",
    "register_coco_json",
    "register_from_arguments",
    "register_toy_shapes",
]
