"""Training runs: launched in several processes, set up, trained and evaluated as a config says.

Configs of both kinds take the same way; `settings` and `configs` know what differs between them.
"""

from .command_line import import_modules, run, run_here, tool_parser, training_parser
from .configs import load_config, load_lazy_config, load_yaml_config, update_lazy_config
from .evaluation import evaluate_checkpoint, evaluate_lazy
from .loop import autocast_dtype, create_ddp_model, make_grad_scaler, record_step, update
from .metrics_file import trim_metrics
from .models import build_model, load_for_training, make_checkpointer
from .random_state import RandomState
from .runs import build_guard, build_optimizer, train_lazy
from .saved_configs import find_config
from .saving import CheckpointHook
from .settings import choose_data
from .setup import set_up_run
from .signals import StopRequest
from .step_report import share_step

__all__ = [
    "CheckpointHook",
    "RandomState",
    "StopRequest",
    "autocast_dtype",
    "build_guard",
    "build_model",
    "build_optimizer",
    "choose_data",
    "create_ddp_model",
    "evaluate_checkpoint",
    "evaluate_lazy",
    "find_config",
    "import_modules",
    "load_config",
    "load_for_training",
    "load_lazy_config",
    "load_yaml_config",
    "make_checkpointer",
    "make_grad_scaler",
    "record_step",
    "run",
    "run_here",
    "set_up_run",
    "share_step",
    "tool_parser",
    "train_lazy",
    "training_parser",
    "trim_metrics",
    "update",
    "update_lazy_config",
]
