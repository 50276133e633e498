"""Setup of a run: its output folder, its log, and a first screen of what it does.

The screen has what a person follows; log.txt in the output folder has everything.
"""

import argparse
import logging
import os
import re
import sys
from os.path import isdir, join

from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..checkpoint import remove_unfinished, require_weights, run_on_main
from .run_lock import lock_run
from .saved_configs import compare_with_saved, has_own_checkpoint, mark_start
from .settings import Config, available_device, check_schedule, get_setting, key_of

logger = logging.getLogger(__name__)

# Loggers whose information belongs on the screen; warnings of all others do, too.
_ON_SCREEN = ("atss", "detectron2.utils.events", "detectron2.evaluation", "detectron2.engine.train")
_RESULTS = ("metrics.json", "last_checkpoint")
_MAX_LINES = 40  # of a message on the screen; a table of 80 classes has 31
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def start_screen() -> logging.Logger:
    """Show what the package says, before there is a folder for a log."""
    own = setup_logger(distributed_rank=comm.get_rank(), name="atss")
    for handler in own.handlers:
        _tidy(handler)
    return own


def set_up_run(cfg: Config, args: argparse.Namespace) -> None:
    """Detectron2's `default_setup` with a short screen, after checks that need no data.

    Args:
        cfg: of either kind.
        args: of `training_parser`.

    Raises:
        FileNotFoundError: nothing to resume, or no such weights.
        ValueError: the output folder cannot be made; see `check_schedule`, `require_weights`,
            `compare_with_saved`, `lock_run`.
    """
    is_training = not getattr(args, "eval_only", False)
    if is_training:
        check_schedule(cfg, comm.get_world_size())
    folder, key = get_setting(cfg, "output_dir"), key_of(cfg, "output_dir")
    if is_training and (getattr(args, "auto_resume", False) or _is_restart()):
        args.resume = getattr(args, "resume", False) or run_on_main(has_own_checkpoint, folder)
    is_resumed = getattr(args, "resume", False)
    require_weights(folder, get_setting(cfg, "weights"), is_resumed)
    try:
        PathManager.mkdirs(folder or ".")
    except OSError as error:
        raise ValueError(
            f"The output folder {folder!r} cannot be made ({error.strerror}). Change {key}."
        ) from error
    if is_training and isdir(folder or "."):
        run_on_main(_take, folder, key)
    is_used = any(PathManager.isfile(join(folder, name)) for name in _RESULTS)
    comm.synchronize()  # no process finds what another has just written
    _open_log(folder)
    if is_used and is_training and not is_resumed:
        logger.warning(
            "%s has the results of an earlier run: new ones are appended to its metrics.json, and "
            "its checkpoints are replaced. Take another %s, or --resume to go on with it.",
            folder,
            key,
        )
    if is_training and is_resumed:
        run_on_main(compare_with_saved, cfg)  # before default_setup replaces the saved config
    elif is_training and comm.is_main_process():
        mark_start(folder)
    default_setup(cfg, args)
    logger.info("%s", _first_screen(cfg, args, is_training))


def _is_restart() -> bool:
    """Whether torchrun or SLURM has started this process before."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


def _take(folder: str, key: str) -> None:
    lock_run(folder, key)
    remove_unfinished(folder)


def _first_screen(cfg: Config, args: argparse.Namespace, is_training: bool) -> str:
    names = (get_setting(cfg, f"{split}_sets") for split in ("train", "val"))
    train, val = (name if isinstance(name, str) else ", ".join(name) for name in names)
    weights = get_setting(cfg, "weights") or "random"
    batch_size = get_setting(cfg, "batch_size", "some")
    lines = {
        "config": getattr(args, "config_file", ""),
        "data": f"train on {train}, evaluate on {val or 'nothing'}" if is_training else val,
        "classes": get_setting(cfg, "num_classes"),
        "device": f"{available_device(cfg)}, {comm.get_world_size()} process(es)",
        "weights": "of the last checkpoint" if getattr(args, "resume", False) else weights,
    }
    if is_training:
        max_iter = get_setting(cfg, "max_iter")
        eval_period = min(get_setting(cfg, "eval_period") or max_iter, max_iter)
        lines["schedule"] = (
            f"{max_iter} iterations of {batch_size} images, evaluated every {eval_period}"
        )
    lines["output"] = f"{get_setting(cfg, 'output_dir')}, with all details in log.txt"
    return "This run:" + "".join(f"\n  {key:<9}{value}" for key, value in lines.items() if value)


def _open_log(folder: str) -> None:
    rank = comm.get_rank()
    # As default_setup calls it, whose own calls then add no handlers: the function is cached.
    fvcore = setup_logger(folder, distributed_rank=rank, name="fvcore")
    detectron2 = setup_logger(folder, distributed_rank=rank)
    own = start_screen()
    own.handlers += [h for h in detectron2.handlers if not _is_screen(h) and h not in own.handlers]
    for handler in {*fvcore.handlers, *detectron2.handlers, *own.handlers}:
        _tidy(handler)


def _is_screen(handler: logging.Handler) -> bool:
    return getattr(handler, "stream", None) in (sys.stdout, sys.stderr)


def _tidy(handler: logging.Handler) -> None:
    """Leave colours to terminals, and what is long or only for the log to the log."""
    if isinstance(handler.formatter, _TidyFormatter):
        return
    is_screen = _is_screen(handler)
    handler.setFormatter(_TidyFormatter(handler.formatter, is_screen, sys.stdout.isatty()))
    if is_screen:
        handler.addFilter(_is_for_screen)


def _is_for_screen(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.startswith(_ON_SCREEN)


class _TidyFormatter(logging.Formatter):
    """Another formatter's text, shortened for the screen, and without colours in files."""

    def __init__(self, formatter: logging.Formatter, is_screen: bool, is_terminal: bool):
        super().__init__()
        self.formatter, self.is_screen = formatter, is_screen
        self.has_colors = is_screen and is_terminal

    def format(self, record: logging.LogRecord) -> str:
        text = self.formatter.format(record)
        if not self.has_colors:
            text = _COLORS.sub("", text)
        lines = text.splitlines()
        if self.is_screen and len(lines) > _MAX_LINES:
            return f"{lines[0]} ({len(lines)} lines, in log.txt)"
        return text
