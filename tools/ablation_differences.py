"""In what does a row differ from its parent, and is that what its file says?

Differences are computed from the two configs, with every argument that was left at its default, so
an assignment of what holds anyway counts as none.
"""

import inspect
from typing import Any, Dict, List, Mapping, Tuple

from ablation_rows import CONFIGS, Row
from omegaconf import DictConfig, OmegaConf

__all__ = ["MISSING", "OUTPUT_DIR", "difference", "faults", "flatten", "showing"]

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
            flat[key] = _name(value)
        else:
            flat[key] = tuple(value) if isinstance(value, list) else value

    visit(OmegaConf.to_container(cfg, resolve=resolve), "")
    return flat


def difference(before: DictConfig, after: DictConfig) -> Dict[str, Tuple[Any, Any]]:
    """Entries that differ between two configs: key -> (before, after), `MISSING` for none."""
    old, new = flatten(before), flatten(after)
    return {
        key: (old.get(key, MISSING), new.get(key, MISSING))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, MISSING) != new.get(key, MISSING)
    }


def faults(row: Row, changed: Mapping[str, Any]) -> List[str]:
    """Where a row does not differ from its parent in exactly the way its file declares.

    Args:
        row: a row with a parent.
        changed: `difference` between parent and row.

    Returns:
        Sentences, none if all is well.
    """
    found = [
        f"{row.name} changes {key}, which it does not assign"
        for key in changed
        if not any(_is_below(key, entry) for entry in row.assigned)
    ]
    found += [
        f"{row.name} assigns {entry}, but it is so in {row.parent} already"
        for entry in row.assigned
        if not any(_is_below(key, entry) for key in changed)
    ]
    is_same = set(changed) <= {OUTPUT_DIR}
    if is_same != row.is_same_as:
        says = "says 'Same as', but differs" if row.is_same_as else "equals it without saying so"
        found.append(f"{row.name} starts from {row.parent} and {says}")
    claimed = (row.path.parent / str(row.claimed)).resolve()
    if claimed != CONFIGS / f"{row.parent}.py":
        found.append(f"{row.name} imports {row.parent}, but names {row.claimed} as its parent")
    return found


def showing(row: Row, changed: Mapping[str, Tuple[Any, Any]]) -> str:
    """A difference in words, one phrase per assigned entry."""
    if row.parent is None:
        return f"starts from {row.model}"
    if row.is_same_as:
        return f"same as {row.parent}"
    phrases = []
    for entry in row.assigned:
        below = {key: values for key, values in changed.items() if _is_below(key, entry)}
        if entry == OUTPUT_DIR or not below:
            continue
        target = below.get(f"{entry}._target_")
        if target:  # another class: its arguments are another list
            old, new = (str(value).rpartition(".")[2] for value in target)
            phrases.append(f"{entry}: {old} -> {new}")
            continue
        phrases += [f"{key}: {_text(old)} -> {_text(new)}" for key, (old, new) in below.items()]
    return "; ".join(phrases)


def _is_below(key: str, entry: str) -> bool:
    return key == entry or key.startswith(f"{entry}.")


def _name(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _defaults(target: Any) -> Dict[str, Any]:
    if not callable(target):
        return {}
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # built in
        return {}
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _text(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value).replace("'", '"')
