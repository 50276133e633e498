"""Configs of both kinds, LazyConfig and YAML: read from files, and settings that both have.

What does not depend on the kind of config is written once, with the names of `_KEYS`.
"""

import argparse
import logging
import os
import tempfile
from typing import Any, Dict, List, Sequence, Union

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from detectron2.utils.registry import locate

from ..build import accepted_arguments
from ..checkpoint import GEOMETRY_KEYS, yacs_overrides
from ..checks import check_integer
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
    "max_iter": ("train.max_iter", "SOLVER.MAX_ITER"),
    "batch_size": ("dataloader.train.total_batch_size", "SOLVER.IMS_PER_BATCH"),
    "eval_period": ("train.eval_period", "TEST.EVAL_PERIOD"),
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
        if data.num_classes is not None:
            put_setting(cfg, "num_classes", data.num_classes)


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


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A LazyConfig with overrides from the command line.

    Args:
        config_file: Python or saved YAML LazyConfig, or the folder of a run.
        overrides: "key=value" strings, see `update_lazy_config`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a YAML config of the other kind; see `update_lazy_config`.
    """
    config_file = find_config(config_file)
    if not config_file.endswith(".py") and _has_capital_keys(config_file):
        raise ValueError(
            f"{config_file} is a YAML config, but a LazyConfig (.py) is needed here: take its .py "
            "twin or tools/train_net.py."
        )
    return update_lazy_config(LazyConfig.load(config_file), overrides)


def update_lazy_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Set config entries, refusing those that nothing reads and values of another type.

    Entries of a part (a node with a `_target_`) may be new where its constructor takes them;
    everywhere else the key must exist.

    Args:
        cfg: changed in place.
        overrides: strings such as "model.assigner.topk=15".

    Returns:
        `cfg`.

    Raises:
        ValueError: for a string without "=", a key that does not exist (listing those that do), a
            value of another type than the config's, or images read in another order of channels
            than the model takes.
    """
    _check_no_options(overrides)
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise ValueError(
                f"Override {override!r} has no '='; write key=value, e.g. train.max_iter=1000."
            )
        key = key.lstrip("+")
        is_in_part = _check_key(cfg, key)
        old = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        try:
            LazyConfig.apply_overrides(cfg, [override])
        except Exception as error:  # of several libraries
            raise ValueError(f"Override {override!r} cannot be read: {_text(error)}") from error
        new = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        if not _can_replace(old, new, is_in_part):
            hint = "; null is Python's None" if new == "None" else ""
            raise ValueError(
                f"{key} needs {_TYPES[type(old)]}, such as {old!r}, got {new!r}{hint}."
            )
    _check_channel_order(cfg)
    return cfg


_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _can_replace(old: Any, new: Any, is_in_part: bool) -> bool:
    """Whether a value suits where another stood; only plain values are compared."""
    kinds = type(old), type(new)
    if kinds[0] == kinds[1] or not all(kind in _TYPES for kind in kinds):
        return True
    # Constructors often take any number where a config happens to have a whole one.
    return kinds == (float, int) or (is_in_part and kinds == (int, float))


def load_yaml_config(config_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """A YAML config with overrides from the command line.

    MODEL.DEVICE becomes "cpu" where it asks for a GPU and there is none.

    Args:
        config_file: YAML file, or the folder of a run.
        overrides: KEY VALUE pairs in one list.

    Returns:
        The config, not frozen.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a config of the other kind, a key that does not exist where the node takes
            no new ones, or a value of the wrong type.
    """
    config_file = find_config(config_file)
    if config_file.endswith(".py"):
        raise ValueError(
            f"{config_file} is a LazyConfig, but a YAML config is needed here: take its .yaml twin "
            "or tools/lazyconfig_train_net.py."
        )
    cfg = get_cfg()
    add_atss_config(cfg)
    try:
        cfg.merge_from_file(config_file)
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(f"{config_file}: {_text(error)}") from error
    _check_no_options(overrides)
    if len(overrides) % 2:
        raise ValueError(f"Overrides are KEY VALUE pairs, got {list(overrides)}.")
    for key, value in zip(overrides[::2], overrides[1::2]):
        _check_key(cfg, key)
        nested = value
        for name in reversed(key.split(".")):
            nested = CfgNode({name: nested})
        try:
            cfg.merge_from_other_cfg(nested)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{key} cannot be {value!r}: {_text(error)}") from error
    cfg.MODEL.DEVICE = available_device(cfg)
    return cfg


def compare_with_saved(cfg: Config) -> None:
    """Say what a run that is about to be resumed has other than before.

    Args:
        cfg: of either kind; compared with config.yaml in its output folder, if there is one.

    Raises:
        ValueError: for another optimizer or number of classes, whose state the run cannot take.
    """
    path = os.path.join(get_setting(cfg, "output_dir"), "config.yaml")
    if not comm.is_main_process() or not os.path.isfile(path):
        return
    with tempfile.TemporaryDirectory() as folder:
        saved = os.path.join(folder, "config.yaml")
        save_config(cfg, saved)
        if not os.path.isfile(saved):  # a LazyConfig with objects that YAML cannot hold
            return
        before, now = _leaves(path), _leaves(saved)
    is_yaml = isinstance(cfg, CfgNode)
    geometry = yacs_overrides(dict.fromkeys(GEOMETRY_KEYS)) if is_yaml else GEOMETRY_KEYS
    keys = [
        key
        for key in sorted({*before, *now} - {*geometry})  # weights decide on their geometry
        if before.get(key) != now.get(key)
    ]
    if not keys:
        return
    what = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys[:10])
    what += "; ..." if len(keys) > 10 else ""
    fixed = {"optimizer._target_", "SOLVER.OPTIMIZER", key_of(cfg, "num_classes")}
    if fixed & {*keys}:
        raise ValueError(
            f"--resume continues a run with another configuration: {what}. The state of its "
            "optimizer and classes does not fit: set them back, or start without --resume from its "
            "weights, in another folder."
        )
    logger.warning(
        "--resume continues a run with another configuration: %s. What the checkpoint holds stays "
        "as it was: learning rate, momentum and weight decay of the optimizer, and the iteration.",
        what,
    )


def save_config(cfg: Config, path: str) -> None:
    """Write a config of either kind as YAML."""
    if isinstance(cfg, CfgNode):
        with open(path, "w", encoding="utf-8") as file:
            file.write(cfg.dump())
    else:
        LazyConfig.save(cfg, path)


def _leaves(path: str) -> Dict[str, Any]:
    """Values of a saved config of either kind by their dotted keys, not interpolated."""
    with open(path, encoding="utf-8") as file:
        pending = [("", yaml.load(file, Loader=_PlainLoader))]
    found = {}
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{key}.{name}" if key else name, part) for name, part in value.items()]
        else:
            found[key] = value
    return found


class _PlainLoader(yaml.SafeLoader):
    """Python's objects in a saved config as their text: only compared, never built."""


_PlainLoader.add_multi_constructor(
    "tag:yaml.org,2002:python/", lambda loader, tag, node: yaml.serialize(node)
)


def find_config(config_file: str) -> str:
    """The config file itself, or config.yaml in the folder of a run.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if os.path.isdir(config_file):
        config_file = os.path.join(config_file, "config.yaml")
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"There is no config file {config_file!r} (--config-file).")
    return config_file


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


def _has_capital_keys(config_file: str) -> bool:
    with open(config_file, encoding="utf-8") as file:
        return any(line.startswith(("MODEL:", "_BASE_:")) for line in file)


def _check_no_options(overrides: Sequence[str]) -> None:
    for override in overrides:
        if str(override).startswith("--"):
            raise ValueError(
                f"{override} comes after an override of the config: put options before them."
            )


def _check_key(cfg: Config, key: str) -> bool:
    """Refuse a key that neither exists nor may be new, listing those there are.

    Returns:
        Whether the key is an argument of a part, a node with a `_target_`.
    """
    node: Any = cfg
    path = key.split(".")
    is_in_part = False
    for depth, name in enumerate(path):
        has_keys = isinstance(node, (CfgNode, DictConfig))
        is_in_part = has_keys and "_target_" in node
        if OmegaConf.is_list(node) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif has_keys and name in node:
            node = node[name]
        elif is_in_part and _may_add(node, path[depth:]):
            return True
        elif isinstance(node, CfgNode) and node.is_new_allowed() and path[depth:] == [name]:
            return False
        else:
            where = ".".join(path[:depth]) or "the config"
            known = sorted(node) if has_keys else "no keys below it"
            raise ValueError(f"Unknown config key {key!r}; {where} has {known}.")
    return is_in_part


def _may_add(part: DictConfig, path: Sequence[str]) -> bool:
    """Whether a part takes a new argument: a value, or a node that begins with its `_target_`."""
    target = part._target_
    try:
        names, takes_any = accepted_arguments(locate(target) if isinstance(target, str) else target)
    except (TypeError, ValueError):  # it has no signature
        names, takes_any = (), True
    return (takes_any or path[0] in names) and (len(path) == 1 or path[1:] == ["_target_"])


def _text(error: Exception) -> str:
    return str(error.args[0]).partition("\n")[0] if error.args else type(error).__name__
