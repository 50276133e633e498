"""How does a YAML file become a config that can run here?"""

import argparse
import logging
import os
from typing import Sequence

import torch

from detectron2.config import CfgNode, get_cfg

from ..config import add_atss_config
from ..data import register_from_arguments

__all__ = ["choose_data", "load_yaml_config"]

logger = logging.getLogger(__name__)


def load_yaml_config(config_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """A YAML config with overrides from the command line.

    MODEL.DEVICE becomes "cpu" where it asks for a GPU that is not there.

    Args:
        config_file: YAML file.
        overrides: KEY VALUE pairs in one list.

    Returns:
        The config, not frozen.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a key that does not exist, or a value of the wrong type.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"There is no config file {config_file!r} (--config-file).")
    cfg = get_cfg()
    add_atss_config(cfg)
    try:
        cfg.merge_from_file(config_file)
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(f"{config_file}: {_text(error)}") from error
    if len(overrides) % 2:
        raise ValueError(f"Overrides are KEY VALUE pairs, got {list(overrides)}.")
    for key, value in zip(overrides[::2], overrides[1::2]):
        _check_key(cfg, key)
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{key} cannot be {value!r}: {_text(error)}") from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %r but there is no GPU: using the CPU.", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def choose_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Put the user's own data into the config, or check the config's; take the classes from it.

    Args:
        cfg: changed in place: DATASETS and the numbers of classes.
        args: of a parser with `add_dataset_arguments`; `opts` tells whether MODEL.ATSS.NUM_CLASSES
            is set explicitly.

    Raises:
        FileNotFoundError, ValueError: see `register_from_arguments`.
    """
    one_stage = cfg.MODEL.META_ARCHITECTURE == "ATSSDetector"
    node = cfg.MODEL.ATSS if one_stage else cfg.MODEL.ROI_HEADS
    key = "MODEL.ATSS.NUM_CLASSES" if one_stage else "MODEL.ROI_HEADS.NUM_CLASSES"
    has_own = any(getattr(args, name, None) for name in ("train_json", "val_json"))
    is_explicit = key in (getattr(args, "opts", None) or [])
    data = register_from_arguments(
        args,
        cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
        node.NUM_CLASSES if is_explicit or not has_own else None,
    )
    if has_own:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = data.train, data.val
        if data.num_classes is not None:
            node.NUM_CLASSES = data.num_classes


def _check_key(cfg: CfgNode, key: str) -> None:
    node = cfg
    path = key.split(".")
    for depth, name in enumerate(path):
        if not isinstance(node, CfgNode) or name not in node:
            where = ".".join(path[:depth]) or "the config"
            known = sorted(node) if isinstance(node, CfgNode) else "no keys below it"
            raise ValueError(f"Unknown config key {key!r}; {where} has {known}.")
        node = node[name]


def _text(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__
