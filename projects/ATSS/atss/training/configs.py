"""Configs of both kinds, LazyConfig and YAML: read from files, and settings that both have.

What does not depend on the kind of config is written once, with the names of `_KEYS`.
"""

import argparse
import logging
import os
from typing import Any, Sequence, Union

import torch
from omegaconf import DictConfig, OmegaConf

from detectron2.config import CfgNode, LazyConfig, get_cfg

from ..config import add_atss_config
from ..data import register_from_arguments

logger = logging.getLogger(__name__)

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
    "channels_last": ("train.channels_last", "SOLVER.CHANNELS_LAST"),
    "compile": ("train.compile", "SOLVER.COMPILE"),
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


def available_device(cfg: Config) -> str:
    """Device that the config asks for; "cpu" where that is a GPU and there is none."""
    device = str(get_setting(cfg, "device"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        key = key_of(cfg, "device")
        logger.warning("%s is %r but there is no GPU: using the CPU.", key, device)
        return "cpu"
    return device


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
        if data.num_classes is not None:
            put_setting(cfg, "num_classes", data.num_classes)


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A LazyConfig with overrides from the command line.

    Args:
        config_file: Python or saved YAML LazyConfig.
        overrides: "key=value" strings, see `update_lazy_config`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: see `update_lazy_config`.
    """
    _check_file(config_file)
    return update_lazy_config(LazyConfig.load(config_file), overrides)


def update_lazy_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Set config entries, refusing those that nothing reads.

    The last name of a key may be new in a part (a node with a `_target_`), whose constructor checks
    it; everywhere else the key must exist.

    Args:
        cfg: changed in place.
        overrides: strings such as "model.assigner.topk=15".

    Returns:
        `cfg`.

    Raises:
        ValueError: for a string without "=", a key that does not exist, listing those that do, or
            images read in another order of channels than the model takes.
    """
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise ValueError(
                f"Override {override!r} has no '='; write key=value, e.g. train.max_iter=1000."
            )
        _check_key(cfg, key.lstrip("+"))
    cfg = LazyConfig.apply_overrides(cfg, list(overrides))
    _check_channel_order(cfg)
    return cfg


def load_yaml_config(config_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """A YAML config with overrides from the command line.

    MODEL.DEVICE becomes "cpu" where it asks for a GPU and there is none.

    Args:
        config_file: YAML file.
        overrides: KEY VALUE pairs in one list.

    Returns:
        The config, not frozen.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a key that does not exist, or a value of the wrong type.
    """
    _check_file(config_file)
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
    cfg.MODEL.DEVICE = available_device(cfg)
    return cfg


def _check_file(config_file: str) -> None:
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"There is no config file {config_file!r} (--config-file).")


def _check_channel_order(cfg: DictConfig) -> None:
    """Refuse a data pipeline that reads images in another order than the model was made for."""
    order = OmegaConf.select(cfg, "model.input_format")
    for split in ("train", "test"):
        key = f"dataloader.{split}.mapper.image_format"
        found = OmegaConf.select(cfg, key)
        if order is not None and found not in (None, order):
            raise ValueError(
                f"{key} is {found!r}, but model.input_format is {order!r}: the model would see red "
                f"and blue exchanged. Set the former to '${{model.input_format}}'."
            )


def _check_key(cfg: Config, key: str) -> None:
    """Refuse a key that the config does not have, listing those it has there."""
    node: Any = cfg
    path = key.split(".")
    for depth, name in enumerate(path):
        has_keys = isinstance(node, (CfgNode, DictConfig))
        if OmegaConf.is_list(node) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif has_keys and name in node:
            node = node[name]
        elif has_keys and "_target_" in node and depth == len(path) - 1:
            return
        else:
            where = ".".join(path[:depth]) or "the config"
            known = sorted(node) if has_keys else "no keys below it"
            raise ValueError(f"Unknown config key {key!r}; {where} has {known}.")


def _text(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__
