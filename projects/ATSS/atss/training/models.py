"""Models of runs: built as a config of either kind says, loaded and saved."""

import logging
import os
from typing import Any

from torch import nn

from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model as build_yaml_model
from detectron2.utils import comm

from ..checkpoint import ATSSCheckpointer, load_or_resume, override_config
from ..device import to_channels_last
from .saved_configs import save_config
from .settings import Config, available_device, data_class_names, get_setting, key_of

logger = logging.getLogger(__name__)


def build_model(cfg: Config) -> nn.Module:
    """The model of a config of either kind, in its memory format, on its device if that exists."""
    if isinstance(cfg, CfgNode):
        model = build_yaml_model(cfg)
    else:
        model = instantiate(cfg.model).to(available_device(cfg))
    if get_setting(cfg, "channels_last", False):
        model = to_channels_last(model)
    return model


def make_checkpointer(cfg: Config, model: nn.Module, **checkpointables: Any) -> ATSSCheckpointer:
    """Checkpointer of a run of either kind, which knows the classes of its data."""
    names = next(iter(data_class_names(cfg, "train_sets").values()), None)
    folder = get_setting(cfg, "output_dir")
    return ATSSCheckpointer(model, folder, class_names=names, **checkpointables)


def load_for_training(cfg: Config, checkpointer: ATSSCheckpointer, resume: bool) -> int:
    """Load what a run starts from; initial weights need not have all parameters.

    Settings that the weights change in the model are put into the config, in `cfg` and in the copy
    in the run's folder, so that this describes the model.

    Args:
        cfg: of either kind; changed in place.
        checkpointer: of `make_checkpointer`.
        resume: continue from the last checkpoint of the run's folder.

    Returns:
        The first iteration to do: the number of those that the checkpoint has done.

    Raises:
        FileNotFoundError, ValueError: see `load_or_resume`.
    """
    weights = get_setting(cfg, "weights")
    loaded = load_or_resume(checkpointer, weights, resume, allow_partial=True)
    if loaded.class_names and loaded.class_names != checkpointer.class_names:
        logger.warning(
            "The weights were trained on other classes (%s, ...) than those of the data (%s, ...): "
            "the class predictor starts from theirs where their number is the same.",
            ", ".join(loaded.class_names[:3]),
            ", ".join((checkpointer.class_names or ["unknown"])[:3]),
        )
    if loaded.changes:
        override_config(cfg, loaded.changes)
        folder = get_setting(cfg, "output_dir")
        if comm.is_main_process() and os.path.isdir(folder):
            save_config(cfg, os.path.join(folder, "config.yaml"))
    start = loaded.num_iters if resume else 0
    if start >= get_setting(cfg, "max_iter"):
        logger.warning(
            "This run is finished: its last checkpoint has %d iterations. Raise %s to train on.",
            start,
            key_of(cfg, "max_iter"),
        )
    return start
