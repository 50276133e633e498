"""Configs in the folder of a run: saved, found, and compared with a run that resumes it."""

import json
import logging
import os
import sys
import tempfile
import time
from typing import Any, Dict

import yaml
from omegaconf import DictConfig, OmegaConf

from detectron2.config import CfgNode, LazyConfig

from ..checkpoint import GEOMETRY_KEYS, yacs_overrides
from .settings import Config, get_setting, key_of

logger = logging.getLogger(__name__)

_START = "run.json"  # written when a run starts from its beginning


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


def load_saved_lazy_config(path: str) -> DictConfig:
    """A LazyConfig from the YAML it was saved as, without building Python objects.

    Detectron2's reader would build any object that the file asks for, and so run its code.

    Raises:
        ValueError: for a file that asks for objects.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(
                f"{path} is not a config of plain values: {str(error).splitlines()[0]}. A saved "
                "config that holds Python objects could run code; use the .py config."
            ) from error
    return OmegaConf.create(content, flags={"allow_objects": True})


def save_config(cfg: Config, path: str) -> None:
    """Write a config of either kind as YAML."""
    if isinstance(cfg, CfgNode):
        with open(path, "w", encoding="utf-8") as file:
            file.write(cfg.dump())
    else:
        LazyConfig.save(cfg, path)


def mark_start(folder: str) -> None:
    """Say in a run's folder that a run starts from its beginning; on the main process."""
    with open(os.path.join(folder, _START), "w", encoding="utf-8") as file:
        json.dump({"command": sys.argv, "time": time.strftime("%Y-%m-%d %H:%M:%S")}, file)


def has_own_checkpoint(folder: str) -> bool:
    """Whether the run that started last in a folder has saved there.

    An earlier run may have left checkpoints, which are older than the mark of this one's start.
    """
    last, start = (os.path.join(folder, name) for name in ("last_checkpoint", _START))
    if not os.path.isfile(last):
        return False
    return not os.path.isfile(start) or os.path.getmtime(last) >= os.path.getmtime(start)


def compare_with_saved(cfg: Config) -> None:
    """Say what a run that is about to be resumed has other than before.

    Args:
        cfg: of either kind; compared with config.yaml in its output folder, if there is one.

    Raises:
        ValueError: for another optimizer or number of classes, whose state the run cannot take.
    """
    path = os.path.join(get_setting(cfg, "output_dir"), "config.yaml")
    if not os.path.isfile(path):
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
