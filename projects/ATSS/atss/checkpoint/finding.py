"""The file that a path, a URL or the folder of a run means: its newest complete checkpoint."""

import logging
import os
import re
import zipfile
from typing import Dict, List, Optional

from .files import CheckpointError, fetch, first_line, read_checkpoint

logger = logging.getLogger(__name__)

FINAL = "model_final.pth"
_MISSING = "is missing"


def find_weights(path: str) -> str:
    """Local file that a path, a URL, or the folder of a run means.

    Args:
        path: "" for none. A folder means its last checkpoint.

    Returns:
        Path of the file; `path` itself if it is a zoo's, which Detectron2 looks up once more.

    Raises:
        FileNotFoundError: no such file, or no checkpoint in the folder.
        CheckpointError: a URL that does not answer.
    """
    if os.path.isdir(path):
        return last_checkpoint(path)
    if "://" in path:
        local_path = fetch(path.partition("?")[0])
        return local_path if path.startswith(("http://", "https://")) else path
    if path and not os.path.isfile(path.partition("?")[0]):
        raise FileNotFoundError(
            f"Weights {path!r} cannot be loaded: there is no such file. Check "
            "train.init_checkpoint (MODEL.WEIGHTS) or --weights."
        )
    return path


def last_checkpoint(folder: str, asked_by: str = "") -> str:
    """The newest complete checkpoint of a run: what its file last_checkpoint names.

    Where that is torn or missing, a warning names it, and the newest complete one before it is
    taken.

    Args:
        folder: output folder of a run.
        asked_by: start of the message, "--resume: ".

    Raises:
        FileNotFoundError: no checkpoint in the folder.
        CheckpointError: none of its checkpoints is complete.
    """
    tag = os.path.join(folder, "last_checkpoint")
    is_tagged = os.path.isfile(tag)
    if not is_tagged and not _older_ones(folder, ""):
        raise FileNotFoundError(
            f"{asked_by}there is no checkpoint in {folder!r}. Name the folder of a run, "
            "train.output_dir (OUTPUT_DIR), or start without --resume."
        )
    named = ""
    if is_tagged:
        with open(tag, "rb") as file:
            named = file.read(4096).decode("utf-8", "replace").strip("\0 \r\n\t")
    faults = []
    if named:
        path = os.path.join(folder, named)
        fault = _fault(path)
        if fault is None:
            return path
        faults.append(f"{named[:40]!r}, which {tag!r} names, {fault}")
    else:
        faults.append(f"{tag!r} {'is empty' if is_tagged else _MISSING}")
    for name in _older_ones(folder, named):
        path = os.path.join(folder, name)
        fault = _fault(path)
        if fault is None:
            logger.warning("%s%s; going on with %r.", asked_by, "; ".join(faults), path)
            return path
        faults.append(f"{name!r} {fault}")
    raise CheckpointError(
        f"{asked_by}no checkpoint in {folder!r} is complete: {'; '.join(faults)}. Start without "
        "--resume, or write the name of a checkpoint in that folder into last_checkpoint."
    )


def numbered_checkpoints(folder: str) -> Dict[str, int]:
    """Iterations of the checkpoints that a run wrote into its folder on its way, by file name."""
    found = (re.fullmatch(r"model_(\d{7,})\.pth", name) for name in os.listdir(folder or "."))
    return {match.group(): int(match.group(1)) for match in found if match}


def _older_ones(folder: str, named: str) -> List[str]:
    """Names of the other checkpoints, newest first; those after the named one are of another run,
    and come last."""
    if not os.path.isdir(folder):
        return []
    iterations = numbered_checkpoints(folder)
    limit = iterations.pop(named, float("inf"))
    path = os.path.join(folder, FINAL)
    if named != FINAL and os.path.isfile(path):
        try:
            iterations[FINAL] = int(read_checkpoint(path).get("iteration", 0))
        except CheckpointError:
            iterations[FINAL] = 0
    return sorted(iterations, key=lambda name: (iterations[name] > limit, -iterations[name]))


def _fault(path: str) -> Optional[str]:
    """What is wrong with a file that should be a complete checkpoint; None if nothing is."""
    if not os.path.isfile(path):
        return _MISSING
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums
        return f"is damaged in {damaged!r}" if damaged else None
    except Exception as error:  # a damaged archive raises nearly anything
        with open(path, "rb") as file:
            if file.read(1) == b"\x80":  # a pickle, of before PyTorch 1.6: only loading tells
                return None
        return f"is torn ({first_line(error)})"
