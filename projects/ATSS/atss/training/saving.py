"""Hooks that save a run and evaluate it, so that it can be resumed as if nothing had happened."""

import logging
import math
import time
from typing import Any, Callable, Dict, Mapping, Optional

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..checkpoint import FINAL, ATSSCheckpointer, run_on_main
from ..checks import check_choice, check_integer
from .metrics_file import recorded
from .random_state import RandomState, undisturbed

logger = logging.getLogger(__name__)

_SECONDS = "evaluation_seconds"  # in metrics.json, of an iteration that was evaluated
_KEY = "train.checkpointer.{} (SOLVER.CHECKPOINTER.{})"


class CheckpointHook(HookBase):
    """Saves checkpoints every some iterations and at the end, and says which one is the best.

    All processes have one: it collects their random states, and they agree on what an error means.

    Args:
        checkpointer: of the run.
        period: iterations between checkpoints; 0 saves only the last one.
        max_to_keep: see `CheckpointWriter`; None keeps all.
        asynchronous: see `CheckpointWriter`.
        on_error: "stop" or "continue" when a checkpoint cannot be written.
        metric: result of the evaluation, higher is better, that tells which checkpoint is the best.
        random_state: collected before each checkpoint, of which it is a part.
        max_iter: number of iterations, where no trainer says it.

    Raises:
        ValueError: for values that cannot be.
    """

    def __init__(
        self,
        checkpointer: ATSSCheckpointer,
        period: int,
        max_to_keep: Optional[int] = None,
        asynchronous: bool = False,
        on_error: str = "stop",
        metric: str = "bbox/AP",
        random_state: Optional[RandomState] = None,
        max_iter: Optional[int] = None,
    ) -> None:
        owner = "The checkpointer"
        key = "train.checkpointer.period (SOLVER.CHECKPOINT_PERIOD)"
        check_integer(owner, "period", period, 0, key)
        if max_to_keep is not None:
            key = _KEY.format("max_to_keep", "MAX_TO_KEEP")
            check_integer(owner, "number of checkpoints to keep", max_to_keep, 1, key)
        key = _KEY.format("on_error", "ON_ERROR")
        check_choice(owner, "on_error", on_error, ("stop", "continue"), key)
        self.checkpointer = checkpointer
        self.period = period
        self.on_error = on_error
        self.metric = metric
        self.random_state = random_state
        self.max_iter = max_iter
        self._best_value = -math.inf
        self._last = (-1, "")  # iteration, name of file
        checkpointer.writer.asynchronous = asynchronous
        checkpointer.writer.max_to_keep = max_to_keep
        if random_state is not None:
            checkpointer.checkpointables["random_state"] = random_state

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter
        start = self.trainer.iter
        self.trainer.iter = start - 1  # whose checkpoint `resume` may write
        self.resume(start)
        self.trainer.iter = start

    def after_step(self) -> None:
        self.step(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self.finish()
            return
        try:  # after an error that others may not have: no agreement
            self.checkpointer.writer.wait()
        except OSError as error:
            logger.error("%s", self._sentence(error))

    def resume(self, num_iters: int) -> None:
        """Go on from the loaded checkpoint; without a trainer, call it on all processes.

        A run that was killed after its last iteration gets the final checkpoint that it lacks.

        Args:
            num_iters: how many iterations the checkpoint had done.

        Raises:
            OSError: see `step`.
        """
        if self.random_state is not None:
            self.random_state.restore(num_iters)
        is_done = self.max_iter is not None and 0 < self.max_iter <= num_iters
        if is_done and not run_on_main(self.checkpointer.get_checkpoint_file).endswith(FINAL):
            self._save(FINAL[: -len(".pth")], num_iters - 1)

    def step(self, iteration: int, results: Optional[Mapping[str, Any]] = None) -> None:
        """What is to do after an iteration. Without a trainer, call it on all processes.

        Args:
            iteration: from 0.
            results: of an evaluation of these weights, if there was one.

        Raises:
            OSError: a checkpoint cannot be written, and `on_error` is "stop".
        """
        is_last = self.max_iter is not None and iteration + 1 >= self.max_iter
        if self.period and (iteration + 1) % self.period == 0:
            self.save_now(iteration)
        elif comm.get_world_size() == 1 and self.checkpointer.writer.has_failed():
            self._agree(self.checkpointer.writer.wait)  # not only a period later
        if is_last:
            self._save(FINAL[: -len(".pth")], iteration)
        if results:
            self.note(iteration, results)

    def save_now(self, iteration: int) -> None:
        """Save a numbered checkpoint, unless there is one of this iteration; all processes call it.

        Raises:
            OSError: see `step`.
        """
        if self._last[0] != iteration:
            self._save(f"model_{iteration:07d}", iteration)

    def finish(self) -> None:
        """Wait until everything is on the disk; all processes call it.

        Raises:
            OSError: see `step`.
        """
        self._agree(self.checkpointer.writer.wait)

    def note(self, iteration: int, results: Mapping[str, Any]) -> None:
        """Remember the checkpoint of an iteration as the best, if its results say so.

        Args:
            iteration: whose weights were evaluated; without a checkpoint of it nothing happens.
            results: of the evaluation, nested or flat ("bbox/AP").
        """
        value = flatten_results_dict(results).get(self.metric)
        if value is None or iteration != self._last[0] or not value > self._best_value:
            return
        self._best_value = float(value)
        if self.checkpointer.save_to_disk:
            try:
                self.checkpointer.writer.name_best(f"{self._last[1]}.pth")
            except OSError as error:  # only a label
                logger.warning("%s", self._sentence(error))

    def state_dict(self) -> Dict[str, Any]:
        best = self.checkpointer.writer.best
        return {"best_value": self._best_value, "best": best, "last": list(self._last)}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._best_value, self._last = state["best_value"], tuple(state["last"])
        self.checkpointer.writer.best = state["best"]

    def _save(self, name: str, iteration: int) -> None:
        if self.random_state is not None:
            self.random_state.gather()
        if self._last[0] != iteration:  # the numbered one is not replaced by a longer training
            self._last = (iteration, name)
        self._agree(lambda: self.checkpointer.save(name, iteration=iteration))

    def _agree(self, act: Callable[[], None]) -> None:
        """Write on the main process; on all processes, stop or go on if that fails."""

        def attempt() -> None:
            try:
                act()
            except OSError as error:
                raise OSError(self._sentence(error)) from error

        try:
            run_on_main(attempt)
        except OSError as error:
            if self.on_error == "stop":
                raise
            logger.warning("%s Training goes on.", error)

    def _sentence(self, error: OSError) -> str:
        return (
            f"A checkpoint cannot be written into {self.checkpointer.save_dir!r} "
            f"({error.strerror or error}); the earlier ones are intact. Free space, or change "
            "train.output_dir (OUTPUT_DIR)."
        )


class EvalHook(hooks.EvalHook):
    """Detectron2's `EvalHook`, which makes up for an evaluation that a killed run did not finish.

    A checkpoint is written before the evaluation of its iteration. Whether that was recorded,
    metrics.json says. The generators of random numbers are left as they were, so that training does
    not depend on it.

    Args:
        period, evaluate: see Detectron2's.
        folder: of the run.
        note: called with iteration and results after each evaluation, on all processes.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], Optional[Dict[str, Any]]],
        folder: str,
        note: Callable[[int, Mapping[str, Any]], None] = lambda *_: None,
    ) -> None:
        super().__init__(period, evaluate)
        self._folder = folder
        self._note = note

    def before_train(self) -> None:
        last = self.trainer.start_iter - 1
        is_due = self._period > 0 and (last + 1) % self._period == 0
        if last < 0 or not is_due or last + 1 >= self.trainer.max_iter:
            return
        results = run_on_main(recorded, self._folder, last, _SECONDS)
        if results is None:
            logger.info("Evaluating iteration %d, which was not done before.", last)
            self.trainer.iter = self.trainer.storage.iter = last
            self._do_eval()
            self.trainer.iter = self.trainer.storage.iter = last + 1
        else:
            self._note(last, results)

    def after_train(self) -> None:
        # A finished run that is resumed does no iteration, after which the trainer counts one more.
        self.trainer.storage.iter = min(self.trainer.iter, self.trainer.max_iter)
        super().after_train()

    def _do_eval(self) -> None:
        start = time.perf_counter()
        with undisturbed():
            super()._do_eval()
        storage = self.trainer.storage
        storage.put_scalar(_SECONDS, time.perf_counter() - start, smoothing_hint=False)
        results = {
            key: value for key, (value, at) in storage.latest().items() if at == storage.iter
        }
        self._note(min(self.trainer.iter, self.trainer.max_iter - 1), results)
