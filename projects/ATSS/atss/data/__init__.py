"""Which images does a run see, and can they be trusted? The toy set, COCO-format files, any set.

A training tool needs a few lines, whatever it trains on::

    add_dataset_arguments(parser)
    ...
    data = register_from_arguments(args, train_names, val_names, num_classes)  # names, classes
    ...
    dataset_dicts = load_dataset_dicts(data.train, data.num_classes)  # checked
"""

from .coco_json import (
    CocoSummary,
    check_coco_json,
    check_num_classes,
    check_same_classes,
    count_classes,
    read_class_names,
    resolve_num_classes,
)
from .dataset_dicts import check_dataset_dicts, load_dataset_dicts
from .registration import (
    Datasets,
    add_dataset_arguments,
    default_root,
    register_coco_json,
    register_from_arguments,
    register_toy_shapes,
)
from .toy_shapes import ToyShapesOptions

__all__ = [
    "CocoSummary",
    "Datasets",
    "ToyShapesOptions",
    "add_dataset_arguments",
    "check_coco_json",
    "check_dataset_dicts",
    "check_num_classes",
    "check_same_classes",
    "count_classes",
    "default_root",
    "load_dataset_dicts",
    "read_class_names",
    "register_coco_json",
    "register_from_arguments",
    "register_toy_shapes",
    "resolve_num_classes",
]
