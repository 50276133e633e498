"""Classes that the data sets of a run share."""

import logging
from typing import List, Optional, Sequence, Tuple

from .annotations import PathLike

logger = logging.getLogger(__name__)


def common_classes(
    sources: Sequence[Tuple[PathLike, Sequence[str]]], num_classes: Optional[int] = None
) -> Optional[List[str]]:
    """Class names that all data sets of a run share; None without sources.

    Training and validation must mean the same by class 0, 1, ..., or AP measures nothing.

    Args:
        sources: files or names of data sets, each with its class names in the order of the ids.
        num_classes: K if the config sets it explicitly; else None.

    Raises:
        ValueError: names or their order differ; `num_classes` is another number.
    """
    if not sources:
        return None
    (source, names), *others = sources
    for other_source, other_names in others:
        if other_names == names:
            continue
        if len(names) != len(other_names):
            difference = f"{len(names)} classes in the one, {len(other_names)} in the other"
        else:
            i = next(i for i, name in enumerate(names) if name != other_names[i])
            difference = f"class {i} is {names[i]!r} in the one, {other_names[i]!r} in the other"
        raise ValueError(
            f"{source} and {other_source} have different categories: {difference}. "
            "Both need the same names in the order of their ids."
        )
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    if num_classes not in (None, len(names)):
        raise ValueError(
            f"The configuration says num_classes={num_classes}, but {source} has {len(names)} "
            f"classes ({shown}). Set num_classes to {len(names)}, leave it out, or give the "
            "correct file."
        )
    logger.info("%d classes, from %s: %s.", len(names), source, shown)
    return list(names)
