"""Training runs: command line, processes, configs of both kinds, one step, whole runs."""

from .command_line import run, training_parser
from .configs import (
    choose_data,
    compare_with_saved,
    find_config,
    load_lazy_config,
    load_yaml_config,
    update_lazy_config,
)
from .loop import autocast_dtype, create_ddp_model, make_grad_scaler
from .runs import (
    build_model,
    evaluate_checkpoint,
    evaluate_lazy,
    load_for_training,
    make_checkpointer,
    train_lazy,
)

__all__ = [
    "autocast_dtype",
    "build_model",
    "choose_data",
    "compare_with_saved",
    "create_ddp_model",
    "evaluate_checkpoint",
    "evaluate_lazy",
    "find_config",
    "load_for_training",
    "load_lazy_config",
    "load_yaml_config",
    "make_checkpointer",
    "make_grad_scaler",
    "run",
    "train_lazy",
    "training_parser",
    "update_lazy_config",
]
