"""Weights: safe files, conversion between code bases, and the geometry that belongs to weights.

Names are translated by declared maps (`sources`), both ways. Geometry travels with them as
overrides (`overrides`): weights trained with anchors at another offset or in another convention of
pixels would otherwise give other boxes without a word.
"""

from .checkpointer import ATSSCheckpointer, load_or_resume, require_checkpoint
from .convert import Converted, convert_checkpoint, detect_source, num_classes_of, rehead
from .files import CheckpointError, check_pickle, fetch, read_checkpoint, write_checkpoint
from .overrides import OVERRIDES_KEY, override_config, override_model, yacs_overrides

__all__ = [
    "ATSSCheckpointer",
    "CheckpointError",
    "Converted",
    "OVERRIDES_KEY",
    "check_pickle",
    "convert_checkpoint",
    "detect_source",
    "fetch",
    "load_or_resume",
    "num_classes_of",
    "override_config",
    "override_model",
    "read_checkpoint",
    "rehead",
    "require_checkpoint",
    "write_checkpoint",
    "yacs_overrides",
]
