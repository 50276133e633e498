"""Configs in the folder of a run: saved, found, and compared with a run that resumes it."""

import logging
import os
import tempfile
from typing import Any, Dict

import yaml

from detectron2.config import CfgNode, LazyConfig
from detectron2.utils import comm

from ..checkpoint import GEOMETRY_KEYS, yacs_overrides
from .settings import Config, get_setting, key_of

logger = logging.getLogger(__name__)


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


def save_config(cfg: Config, path: str) -> None:
    """Write a config of either kind as YAML."""
    if isinstance(cfg, CfgNode):
        with open(path, "w", encoding="utf-8") as file:
            file.write(cfg.dump())
    else:
        LazyConfig.save(cfg, path)


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
