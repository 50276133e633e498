"""Options of the command-line tools, and how they run: in several processes, with short errors."""

import argparse
import sys
from typing import Any, Callable, Optional

import torch

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..data import add_dataset_arguments
from .launch import launch

# What a user can cause and fix: a sentence is enough. Anything else is a bug and shows its trace.
_USER_ERRORS = (ValueError, FileNotFoundError, FloatingPointError)


def training_parser(description: str) -> argparse.ArgumentParser:
    """Options of Detectron2's training tools, and those for your data.

    Args:
        description: docstring of the tool; shown as it is.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config to use")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the output folder's last checkpoint"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        help="processes on this machine, one per GPU; CPU processes where there is no GPU",
    )
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="which machine this is, from 0")
    parser.add_argument(
        "--dist-url", default="auto", help="where processes meet, e.g. tcp://127.0.0.1:8686"
    )
    add_dataset_arguments(parser)
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config overrides: key=value for a LazyConfig, KEY VALUE pairs for YAML",
    )
    return parser


def run(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    device_of: Optional[Callable[[argparse.Namespace], str]] = None,
) -> None:
    """Run a tool's `main` in all its processes; exit with 1 and one line on a user's mistake.

    Args:
        main: of the tool, in its module's top level, so that workers can import it.
        args: of `training_parser`.
        device_of: reads from `args` where the config wants the model, which several processes must
            know before they start; "cuda" if not given.
    """
    try:
        is_alone = args.num_gpus * args.num_machines == 1
        device = "cuda" if is_alone or device_of is None else device_of(args)
        launch(
            _run_worker,
            args.num_gpus,
            args.num_machines,
            args.machine_rank,
            args.dist_url,
            args=(main, args),
            device=device,
        )
    except _USER_ERRORS as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except torch.multiprocessing.ProcessRaisedException as error:
        # The last line of a worker's trace is its error.
        last_line = str(error).strip().splitlines()[-1]
        if last_line.startswith(tuple(kind.__name__ for kind in _USER_ERRORS)):
            sys.exit(last_line)
        raise


def _run_worker(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    # Before the config is read: what is said about data and classes must be seen.
    setup_logger(distributed_rank=comm.get_rank(), name="atss")
    main(args)
