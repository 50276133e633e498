"""Writing of a run's checkpoints: in order, in a thread if asked, old ones removed."""

import copy
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Dict, Optional

import torch
from torch import Tensor

from .files import UNFINISHED, write_checkpoint, write_text
from .finding import numbered_checkpoints


class CheckpointWriter:
    """Writes checkpoints into a folder, one after the other.

    Args:
        folder: of the run.
        asynchronous: copy tensors to the host and let a thread write them, while training goes on;
            at most one is in flight, and the end of the process waits for it.
        max_to_keep: how many numbered checkpoints ("model_0000099.pth") stay besides the best; None
            for all.
    """

    def __init__(
        self, folder: str, asynchronous: bool = False, max_to_keep: Optional[int] = None
    ) -> None:
        self.folder = folder
        self.asynchronous = asynchronous
        self.max_to_keep = max_to_keep
        self.best: Optional[str] = None  # name of the file that always stays
        self._pool: Optional[ThreadPoolExecutor] = None
        self._in_flight: Optional[Future] = None

    def write(self, content: Dict[str, Any], name: str) -> None:
        """Write a checkpoint, then its name into last_checkpoint, then remove old ones.

        Args:
            content: tensors and plain values in dicts, lists and tuples.
            name: of the file.

        Raises:
            OSError: the file, or in asynchronous mode the one before, could not be written; those
                that were there are still. This one is written in the latter case, too.
        """
        try:
            self.wait()
        finally:  # what was wrong with the one before may be over
            if not self.asynchronous:
                self._write(content, name)
            else:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(1, "checkpoint")  # joined at the process's end
                self._in_flight = self._pool.submit(self._write, to_host(content), name)

    def wait(self) -> None:
        """Wait for what is being written; raise, once, what went wrong with it."""
        future, self._in_flight = self._in_flight, None
        if future is not None:
            future.result()

    def has_failed(self) -> bool:
        """Whether `wait` would raise, as far as is known without waiting."""
        future = self._in_flight
        return future is not None and future.done() and future.exception() is not None

    def name_best(self, name: str) -> None:
        """Keep a checkpoint, and write its name into best_checkpoint."""
        self.best = name
        write_text(name, os.path.join(self.folder, "best_checkpoint"))

    def _write(self, content: Dict[str, Any], name: str) -> None:
        write_checkpoint(content, os.path.join(self.folder, name))
        write_text(name, os.path.join(self.folder, "last_checkpoint"))
        iterations = numbered_checkpoints(self.folder)
        if self.max_to_keep is None or name not in iterations:
            return
        # Those after this one are of another run.
        own = sorted((i, other) for other, i in iterations.items() if i <= iterations[name])
        for _, old in own[: -self.max_to_keep]:
            if old != self.best:
                os.remove(os.path.join(self.folder, old))


def remove_unfinished(folder: str) -> None:
    """Remove what killed runs have left in a folder that no other run writes into."""
    for name in os.listdir(folder or "."):
        if re.search(rf"\.\d+{re.escape(UNFINISHED)}$", name):  # a checkpoint, or a text beside it
            os.remove(os.path.join(folder, name))


def to_host(content: Any) -> Any:
    """A copy on the CPU that later steps do not change; page-locked where it comes from a GPU."""
    copied = _copy(content)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach()
        if not value.is_cuda:
            return value.to("cpu", copy=True)
        host = torch.empty_like(value, device="cpu", pin_memory=True)
        return host.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with the versions that a state dict has as an attribute
        copied.update({key: _copy(entry) for key, entry in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(map(_copy, value))
    return copy.deepcopy(value)
