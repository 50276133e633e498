"""Options of the command-line tools, and how they run: in several processes, with short errors."""

import argparse
import importlib
import os
import sys
from typing import Any, Callable, Optional, Sequence

import torch

from ..data import add_dataset_arguments
from .launch import join_job, launch, launched_place
from .settings import Config, available_device
from .setup import start_screen
from .signals import STOPPED
from .slurm import submit_job

# What a user can cause and fix: a sentence is enough. Anything else is a bug and shows its trace.
_USER_ERRORS = (ValueError, OSError, FloatingPointError)


class UserMistake(Exception):
    """The sentence of an error that a user can fix; processes pass on its text, not its class."""


def tool_parser(description: str, **options: Any) -> argparse.ArgumentParser:
    """Parser of a tool that reads a config: with `--import`, for modules of your own.

    Args:
        description: docstring of the tool; shown as it is.
        **options: of `argparse.ArgumentParser`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import your module first, such as one that registers parts; it lies in the current "
        "folder or on PYTHONPATH",
    )
    return parser


def training_parser(description: str) -> argparse.ArgumentParser:
    """`tool_parser` with the options of Detectron2's training tools, and those for your data."""
    parser = tool_parser(description)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config to use")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the output folder's last checkpoint"
    )
    parser.add_argument(
        "--auto-resume",
        action="store_true",
        help="--resume if the output folder has a checkpoint of this run, else start; a process "
        "that torchrun or SLURM started again does so unasked",
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
    parser.add_argument(
        "--slurm",
        metavar="NAME=VALUE,...",
        help="submit this command to SLURM, with parameters of submitit: a node for each machine, "
        "a task for each process, e.g. timeout_min=1440,slurm_partition=gpu",
    )
    add_dataset_arguments(parser)
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config overrides: key=value for a LazyConfig, KEY VALUE pairs for YAML",
    )
    return parser


def import_modules(names: Sequence[str]) -> None:
    """Import what --import asks for.

    Raises:
        ValueError: for a module that there is not, or that imports one.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"--import {name}: {error}.") from error


def run_here(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run a tool's `main` in this process, and exit with its result; mistakes end as in `run`.

    Args:
        main: of the tool.
        args: of `tool_parser`.
    """
    try:
        import_modules(args.modules)
        sys.exit(main(args))
    except _USER_ERRORS as error:
        sys.exit(_sentence(error))


def run(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    load: Optional[Callable[[str, Sequence[str]], Config]] = None,
) -> None:
    """Run a tool's `main` in all its processes; exit with 1 and one line on a user's mistake.

    Args:
        main: of the tool, in its module's top level, so that workers can import it.
        args: of `training_parser`.
        load: reads the tool's kind of config, whose device several processes must know before they
            start; it is "cuda" if not given.
    """
    try:
        import_modules(args.modules)
        place = launched_place()
        count = place.world_size if place else args.num_gpus * args.num_machines
        is_submitted = place is None and getattr(args, "slurm", None) is not None
        device = "cuda"
        if load is not None and (count > 1 or is_submitted):
            device = available_device(load(args.config_file, args.opts))
        if is_submitted:
            submit_job(args, device)
        elif place is not None:
            if args.num_gpus * args.num_machines != 1:
                raise ValueError(
                    "The program that started this process decides on the number of processes: "
                    "leave out --num-gpus and --num-machines (torchrun takes --nproc-per-node)."
                )
            join_job(_run_worker, place, args=(main, args), device=device)
        else:
            launch(
                _run_worker,
                args.num_gpus,
                args.num_machines,
                args.machine_rank,
                args.dist_url,
                args=(main, args),
                device=device,
            )
    except UserMistake as mistake:
        sys.exit(str(mistake))
    except _USER_ERRORS as error:
        sys.exit(_sentence(error))
    except torch.multiprocessing.ProcessRaisedException as error:
        _, is_mistake, sentence = str(error).rpartition(f"{UserMistake.__name__}: ")
        if is_mistake:
            sys.exit(sentence.strip())
        raise
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code == STOPPED:
            sys.exit(STOPPED)
        raise


def _run_worker(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    # Before the config is read: what is said about data and classes must be seen.
    start_screen()
    try:
        import_modules(args.modules)
        main(args)
    except _USER_ERRORS as error:
        raise UserMistake(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    if "in DataLoader worker process" in text:  # the error itself is the last line of a trace
        return text.splitlines()[-1]
    return f"{type(error).__name__}: {text}"
