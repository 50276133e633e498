"""Training runs: command line, processes, configs of both kinds, one step, whole runs."""

from .command_line import import_modules, run, run_here, tool_parser, training_parser
from .configs import (
    choose_data,
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
    say_if_finished,
    train_lazy,
)
from .setup import set_up_run

__all__ = [
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
    "run_here",
    "say_if_finished",
    "set_up_run",
    "tool_parser",
    "train_lazy",
    "training_parser",
    "update_lazy_config",
]
