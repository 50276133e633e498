"""metrics.json of a run that is resumed: each iteration stays there once."""

import json
import os
from typing import Any, Callable, Dict, List, Optional

from detectron2.engine import hooks
from detectron2.utils.events import EventStorage, EventWriter

from ..checkpoint import write_text


def trim_metrics(folder: str, num_iters: int) -> List[str]:
    """Remove what a killed run recorded after the checkpoint that it is resumed from.

    Args:
        folder: of the run; nothing happens if there is no metrics.json.
        num_iters: how many iterations the checkpoint has done.

    Returns:
        The lines that were removed.
    """
    path = os.path.join(folder, "metrics.json")
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines(keepends=True)
    kept, removed = [], []
    for line in lines:
        is_kept = _iteration(line) < num_iters and line.endswith("\n")
        (kept if is_kept else removed).append(line)
    if removed:
        write_text("".join(kept), path)
    return removed


def recorded(folder: str, iteration: int, key: str) -> Optional[Dict[str, Any]]:
    """The line of metrics.json of an iteration that has an entry; None if there is none."""
    try:
        with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as file:
            lines = [line for line in file if _iteration(line) == iteration]
    except (OSError, UnicodeDecodeError):
        return None
    return next((entry for entry in map(json.loads, lines) if key in entry), None)


def _iteration(line: str) -> float:
    """Infinite for a line that was not written to its end."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class MetricsWriter(hooks.PeriodicWriter):
    """Detectron2's `PeriodicWriter`, whose writers find a metrics.json that ends at the checkpoint.

    Args:
        build_writers: makes the writers, when training starts.
        folder: of the run.
        period: see `PeriodicWriter`.
    """

    def __init__(
        self, build_writers: Callable[[], List[EventWriter]], folder: str, period: int = 20
    ) -> None:
        super().__init__([], period)
        self._build_writers = build_writers
        self._folder = folder

    def before_train(self) -> None:
        start = self.trainer.start_iter
        latest = self.trainer.storage.latest().items()
        made_up = {key: value for key, (value, at) in latest if at == start - 1}
        removed = trim_metrics(self._folder, start - bool(made_up)) if start > 0 else []
        self._writers = self._build_writers()
        del self._build_writers  # it may hold the trainer, which holds this hook
        if not made_up:
            return
        # An evaluation joins what else is known of its iteration. A storage of its own: whether
        # Detectron2 is to smooth these values over iterations cannot be told from the file.
        with EventStorage(start - 1) as storage:
            known: Dict[str, Any] = {}
            for line in removed:
                if _iteration(line) == start - 1:
                    known.update(json.loads(line))
            known.pop("iteration", None)
            storage.put_scalars(**{**known, **made_up}, smoothing_hint=False)
            for writer in self._writers:
                writer.write()
