"""Differences of a row from its parent, computed from the two configs.

Arguments left at their defaults are part of the comparison, so spelling out a default is no
difference.
"""

import inspect
from typing import Any, Dict, List, Mapping

from omegaconf import DictConfig, OmegaConf

from .rows import Row

MISSING = "(not set)"
OUTPUT_DIR = "train.output_dir"


def flatten(cfg: DictConfig, resolve: bool = False, defaults: bool = True) -> Dict[str, Any]:
    """Every entry of a config by its dotted key, arguments left at their defaults included.

    With the defaults, `L(Rule)()` and `L(Rule)(k=9)` are equal where 9 is the default.

    Args:
        cfg: a LazyConfig.
        resolve: follow interpolations; else they are compared as they are written.
        defaults: include those arguments.

    Returns:
        Key -> number, string, class name, tuple or None. Lists of nodes are numbered.
    """
    flat: Dict[str, Any] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            if defaults and "_target_" in value:
                value = {**_defaults(value["_target_"]), **value}
            for name, child in value.items():
                visit(child, f"{key}.{name}" if key else str(name))
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            for i, child in enumerate(value):
                visit(child, f"{key}.{i}")
        elif callable(value):
            flat[key] = f"{value.__module__}.{value.__qualname__}"
        else:
            flat[key] = tuple(value) if isinstance(value, list) else value

    visit(OmegaConf.to_container(cfg, resolve=resolve), "")
    return flat


def _defaults(target: Any) -> Dict[str, Any]:
    if not callable(target):
        return {}
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # built in
        return {}
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def differences(before: DictConfig, after: DictConfig) -> Dict[str, str]:
    """Entries that differ between two configs: key -> "old -> new".

    A part of another class is one entry, under its own key: its arguments are another list.
    """
    old, new = flatten(before), flatten(after)
    keys = sorted(k for k in {*old, *new} if old.get(k, MISSING) != new.get(k, MISSING))
    parts = [key[: -len("._target_")] for key in keys if key.endswith("._target_")]
    found = {}
    for key in keys:
        values = [_text(flat.get(key, MISSING)) for flat in (old, new)]
        part = next((part for part in parts if _is_below(key, part)), None)
        if part is None:
            found[key] = " -> ".join(values)
        elif key == f"{part}._target_":
            found[part] = " -> ".join(value.strip('"').rpartition(".")[2] for value in values)
    return found


def faults(row: Row, before: DictConfig, after: DictConfig) -> List[str]:
    """Where a row does not differ from its parent in exactly the way its file declares.

    Args:
        row: the declaration.
        before: the config of `row.origin`; where it is a model of `configs/common`, only models
            are compared.
        after: the row's own.

    Returns:
        Sentences, none if all is well.
    """
    found = _compared(row, before, after)
    sentences = []
    if "train" in before and found.pop(OUTPUT_DIR, None) is None:
        sentences.append(f"{row.name} has the {OUTPUT_DIR} of {row.origin}")
    if row.parent and not found:
        sentences.append(f"{row.name} equals {row.parent}: declare it as same_as, not as parent")
    sentences += [
        f"{row.name} differs from {row.origin} in '{key}: {change}', which it does not declare"
        for key, change in found.items()
        if not any(_covers(declared, key, change) for declared in row.changes)
    ]
    sentences += [
        f"{row.name} declares '{declared}', which is no difference from {row.origin}"
        for declared in row.changes
        if not any(_covers(declared, key, change) for key, change in found.items())
    ]
    return sentences


def describe_changes(row: Row, before: DictConfig, after: DictConfig) -> str:
    """The differences of a row from its parent in words; arguments as of `faults`."""
    if row.same_as:
        return f"same as {row.same_as}"
    found = _compared(row, before, after)
    return "; ".join(f"{key}: {change}" for key, change in found.items() if key != OUTPUT_DIR)


def _compared(row: Row, before: DictConfig, after: DictConfig) -> Dict[str, str]:
    is_model = row.origin.startswith("common/")
    return differences(before, OmegaConf.masked_copy(after, "model") if is_model else after)


def _covers(declared: str, key: str, change: str) -> bool:
    return declared == f"{key}: {change}" or _is_below(key, declared)


def _is_below(key: str, entry: str) -> bool:
    return key == entry or key.startswith(f"{entry}.")


def _text(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value).replace("'", '"')
