"""Configs of both kinds, LazyConfig and YAML: read from files, and changed on the command line."""

from typing import Any, Sequence

from omegaconf import DictConfig, OmegaConf

from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.utils.registry import locate

from ..build import accepted_arguments
from ..config import add_atss_config
from .saved_configs import find_config, load_saved_lazy_config
from .settings import Config, available_device


def load_config(config_file: str, overrides: Sequence[str] = ()) -> Config:
    """A config of either kind, by what its file is.

    Args:
        config_file: Python or YAML file, or the folder of a run.
        overrides: as its kind takes them.

    Raises:
        FileNotFoundError, ValueError: see `load_lazy_config`, `load_yaml_config`.
    """
    config_file = find_config(config_file)
    is_lazy = config_file.endswith(".py") or not _has_capital_keys(config_file)
    return (load_lazy_config if is_lazy else load_yaml_config)(config_file, overrides)


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A LazyConfig with overrides from the command line.

    Args:
        config_file: Python or saved YAML LazyConfig, or the folder of a run.
        overrides: "key=value" strings, see `update_lazy_config`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a YAML config of the other kind, or one that could run code; see
            `update_lazy_config`.
    """
    config_file = find_config(config_file)
    if not config_file.endswith(".py") and _has_capital_keys(config_file):
        raise ValueError(
            f"{config_file} is a YAML config, but a LazyConfig (.py) is needed here: take its .py "
            "twin or tools/train_net.py."
        )
    if config_file.endswith(".py"):
        return update_lazy_config(LazyConfig.load(config_file), overrides)
    return update_lazy_config(load_saved_lazy_config(config_file), overrides)


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
