"""Which weights exist already, and what do they become here?

Names are translated by declared maps (`sources`), both ways. Geometry travels with them as
overrides (`overrides`): weights trained with anchors at another offset or in another convention of
pixels give other boxes without a word if only their names change.
"""

from .convert import Converted, convert_checkpoint, detect_source, num_classes_of, rehead
from .files import CheckpointError, check_pickle, fetch, read_checkpoint, write_checkpoint
from .overrides import apply_overrides, override_config, yacs_overrides

__all__ = [
    "CheckpointError",
    "Converted",
    "apply_overrides",
    "check_pickle",
    "convert_checkpoint",
    "detect_source",
    "fetch",
    "num_classes_of",
    "override_config",
    "read_checkpoint",
    "rehead",
    "write_checkpoint",
    "yacs_overrides",
]
