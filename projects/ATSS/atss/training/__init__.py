"""Training runs: launched in several processes, set up, trained and evaluated as a config says.

Configs of both kinds take the same way; `settings` and `configs` know what differs between them.
"""

from .command_line import import_modules, run, run_here, tool_parser, training_parser
from .configs import load_lazy_config, load_yaml_config, update_lazy_config
from .evaluation import evaluate_checkpoint, evaluate_lazy
from .loop import autocast_dtype, create_ddp_model, make_grad_scaler
from .models import build_model, load_for_training, make_checkpointer
from .runs import build_optimizer, train_lazy
from .saved_configs import find_config
from .settings import choose_data
from .setup import set_up_run

__all__ = [
    "autocast_dtype",
    "build_model",
    "build_optimizer",
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
    "set_up_run",
    "tool_parser",
    "train_lazy",
    "training_parser",
    "update_lazy_config",
]
