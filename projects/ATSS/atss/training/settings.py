"""Settings that configs of both kinds have, LazyConfig and YAML, under names of our own.

What does not depend on the kind of config is written once, with the names of `_KEYS`.
"""

import argparse
import logging
from typing import Any, Dict, List, Union

import torch
from omegaconf import DictConfig

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import log_first_n

from ..checks import check_integer
from ..data import register_from_arguments

Config = Union[DictConfig, CfgNode]

# Name of a setting: its key in a LazyConfig, its key in a YAML config.
_KEYS = {
    "device": ("train.device", "MODEL.DEVICE"),
    "output_dir": ("train.output_dir", "OUTPUT_DIR"),
    "weights": ("train.init_checkpoint", "MODEL.WEIGHTS"),
    "num_classes": ("model.num_classes", "MODEL.ATSS.NUM_CLASSES"),
    "num_classes_of_roi_heads": ("model.roi_heads.num_classes", "MODEL.ROI_HEADS.NUM_CLASSES"),
    "train_sets": ("dataloader.train.dataset.names", "DATASETS.TRAIN"),
    "val_sets": ("dataloader.test.dataset.names", "DATASETS.TEST"),
    "max_iter": ("train.max_iter", "SOLVER.MAX_ITER"),
    "batch_size": ("dataloader.train.total_batch_size", "SOLVER.IMS_PER_BATCH"),
    "seed": ("train.seed", "SEED"),
    "eval_period": ("train.eval_period", "TEST.EVAL_PERIOD"),
    "channels_last": ("train.channels_last", "SOLVER.CHANNELS_LAST"),
    "compile": ("train.compile", "SOLVER.COMPILE"),
    "max_nonfinite_steps": ("train.max_nonfinite_steps", "SOLVER.MAX_NONFINITE_STEPS"),
    "amp": ("train.amp.enabled", "SOLVER.AMP.ENABLED"),
    "amp_precision": ("train.amp.precision", "SOLVER.AMP.PRECISION"),
    "prepare": ("train.prepare", "TEST.PREPARE"),
    "tta": ("train.tta.enabled", "TEST.AUG.ENABLED"),
}


def key_of(cfg: Config, name: str) -> str:
    """Key under which a config keeps a setting.

    The classes are those of the final detector: the first stage of a two-stage model knows none.
    """
    is_yaml = isinstance(cfg, CfgNode)
    if name == "num_classes":
        is_one_stage = (
            cfg.MODEL.META_ARCHITECTURE == "ATSSDetector"
            if is_yaml
            else "roi_heads" not in cfg.model
        )
        name = "num_classes" if is_one_stage else "num_classes_of_roi_heads"
    return _KEYS[name][is_yaml]


def get_setting(cfg: Config, name: str, *default: Any) -> Any:
    """A setting, or the default, if given, in a config without the key (of an older version)."""
    value: Any = cfg
    for part in key_of(cfg, name).split("."):
        if default and part not in value:
            return default[0]
        value = value[part]
    return value


def put_setting(cfg: Config, name: str, value: Any) -> None:
    """Change a setting in place."""
    node, _, last = key_of(cfg, name).rpartition(".")
    for part in node.split("."):
        cfg = cfg[part]
    setattr(cfg, last, value)


def checkpoint_settings(cfg: Config) -> Dict[str, Any]:
    """What a config of either kind says of checkpoints, as `CheckpointHook` takes it."""
    if not isinstance(cfg, CfgNode):
        return dict(cfg.train.checkpointer)
    node = cfg.SOLVER.get("CHECKPOINTER", {})
    return {
        "period": cfg.SOLVER.CHECKPOINT_PERIOD,
        **{key.lower(): value for key, value in node.items()},
    }


def available_device(cfg: Config) -> str:
    """Device that the config asks for; "cpu" where that is a GPU and there is none."""
    device = str(get_setting(cfg, "device"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        key = key_of(cfg, "device")
        log_first_n(  # each part of a run asks
            logging.WARNING,
            f"{key} is {device!r} but there is no GPU: using the CPU.",
            key="message",
        )
        return "cpu"
    return device


def data_class_names(cfg: Config, sets: str) -> Dict[str, List[str]]:
    """Class names of the data sets of a config, in the order of the ids; without unknown ones.

    Args:
        cfg: of either kind.
        sets: "train_sets" or "val_sets".
    """
    names = get_setting(cfg, sets, ())
    found = {
        name: MetadataCatalog.get(name).get("thing_classes")
        for name in ([names] if isinstance(names, str) else names)
    }
    return {name: list(classes) for name, classes in found.items() if classes}


def choose_data(cfg: Config, args: argparse.Namespace) -> None:
    """Put your data into the config, or check the config's; take the classes from it.

    Args:
        cfg: changed in place: names of the data sets, number of classes.
        args: of a parser with `add_dataset_arguments`; `opts` says whether the number of classes is
            set explicitly.

    Raises:
        FileNotFoundError, ValueError: see `register_from_arguments`.
    """
    is_yours = any(getattr(args, name, None) for name in ("train_json", "val_json"))
    key, overrides = key_of(cfg, "num_classes"), getattr(args, "opts", None) or []
    is_explicit = any(override.partition("=")[0] == key for override in overrides)
    data = register_from_arguments(
        args,
        get_setting(cfg, "train_sets"),
        get_setting(cfg, "val_sets"),
        get_setting(cfg, "num_classes") if is_explicit or not is_yours else None,
    )
    if is_yours:
        put_setting(cfg, "train_sets", data.train)
        put_setting(cfg, "val_sets", data.val)
        put_setting(cfg, "num_classes", len(data.class_names))


def check_schedule(cfg: Config, num_processes: int) -> None:
    """Refuse a training of no iterations, or whose batches the processes cannot share.

    Raises:
        ValueError: naming the key of the config.
    """
    key = key_of(cfg, "max_iter")
    check_integer("A training", "number of iterations", get_setting(cfg, "max_iter"), 1, key)
    size, key = get_setting(cfg, "batch_size", num_processes), key_of(cfg, "batch_size")
    check_integer("A training", "number of images in a batch", size, 1, key)
    if size % num_processes:
        raise ValueError(
            f"A batch of {size} images cannot be shared by {num_processes} processes: give each as "
            f"many. Change {key} or --num-gpus."
        )
