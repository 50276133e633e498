"""Weights: safe files, conversion between code bases, and the geometry that belongs to weights.

Names are translated by declared maps (`sources`), both ways. Geometry is part of the state dict
(`stored_settings`); that of other code bases is put into their weights as overrides (`overrides`).
docs/weights.md says who checks what.
"""

from .checkpointer import (
    IS_OPTIONAL,
    ATSSCheckpointer,
    Loaded,
    load_or_resume,
    require_weights,
)
from .convert import Converted, convert_checkpoint, detect_source, num_classes_of, rehead
from .files import (
    CheckpointError,
    check_pickle,
    fetch,
    read_checkpoint,
    write_checkpoint,
    write_text,
)
from .finding import FINAL, find_weights
from .overrides import (
    GEOMETRY_KEYS,
    OVERRIDES_KEY,
    override_config,
    override_model,
    override_weights,
    yacs_overrides,
)
from .processes import run_on_main
from .writing import CheckpointWriter, remove_unfinished

__all__ = [
    "ATSSCheckpointer",
    "CheckpointError",
    "CheckpointWriter",
    "Converted",
    "FINAL",
    "GEOMETRY_KEYS",
    "IS_OPTIONAL",
    "Loaded",
    "OVERRIDES_KEY",
    "check_pickle",
    "convert_checkpoint",
    "detect_source",
    "fetch",
    "find_weights",
    "load_or_resume",
    "num_classes_of",
    "override_config",
    "override_model",
    "override_weights",
    "read_checkpoint",
    "rehead",
    "remove_unfinished",
    "require_weights",
    "run_on_main",
    "write_checkpoint",
    "write_text",
    "yacs_overrides",
]
