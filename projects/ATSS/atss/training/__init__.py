"""Training runs: command line, processes, configs of both kinds, one step, whole runs."""

from .command_line import add_import_argument, import_modules, run, training_parser
from .configs import load_lazy_config, load_yaml_config, update_lazy_config
from .loop import autocast_dtype, create_ddp_model, make_grad_scaler
from .runs import (
    build_model,
    evaluate_checkpoint,
    evaluate_lazy,
    load_for_training,
    make_checkpointer,
    say_if_finished,
    train_lazy,
)
from .saved_configs import find_config
from .settings import choose_data
from .setup import set_up_run

__all__ = [
    "add_import_argument",
    "autocast_dtype",
    "build_model",
    "choose_data",
    "create_ddp_model",
    "evaluate_checkpoint",
    "evaluate_lazy",
    "find_config",
    "import_modules",
    "load_for_training",
    "load_lazy_config",
    "load_yaml_config",
    "make_checkpointer",
    "make_grad_scaler",
    "run",
    "say_if_finished",
    "set_up_run",
    "train_lazy",
    "training_parser",
    "update_lazy_config",
]
