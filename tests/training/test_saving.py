"""Runs that are killed and resumed: checkpoints, evaluations, curves, random states."""

import builtins
import errno
import json
import logging
import math
import random
from concurrent.futures import wait

import numpy as np
import pytest
import torch
from atss.checkpoint import ATSSCheckpointer, read_checkpoint
from atss.checkpoint import files as checkpoint_files
from atss.training import CheckpointHook, RandomState, trim_metrics
from atss.training.launch import launch
from atss.training.loop import StepTrainer
from atss.training.metrics_file import MetricsWriter
from atss.training.random_state import undisturbed
from atss.training.saving import EvalHook
from torch import nn

from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter


class Killed(BaseException):
    """Stands for a kill: nothing of the run may catch it."""


class Noisy(nn.Module):
    """Its loss depends on the generator of random numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, batch):
        return {"loss": (self.weight * torch.rand(4) * batch).sum()}


class Settled(hooks.HookBase):
    """Waits until the thread has written, so that it is certain when a fault is noticed."""

    def __init__(self, writer):
        self.writer = writer

    def after_step(self):
        wait([self.writer._in_flight] if self.writer._in_flight else [])


def train(folder, max_iter=8, kill_in_evaluation=None, ap=lambda i: float(i), **options):
    """Train with the hooks of a run, from the last checkpoint if there is one; evaluate every 2."""
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = StepTrainer(model, [torch.tensor(1.0)] * 100, optimizer)
    checkpointer = ATSSCheckpointer(model, str(folder), trainer=trainer)
    evaluated = []

    def evaluate():
        torch.rand(3)  # as making a data loader draws a seed
        iteration = int(trainer.storage.iter)
        evaluated.append(iteration)
        if kill_in_evaluation == iteration:
            raise Killed
        return {"bbox": {"AP": ap(iteration)}}

    saving = CheckpointHook(
        checkpointer, **{"period": 2, **options}, random_state=RandomState(seed=7)
    )
    json_file = str(folder / "metrics.json")
    trainer.register_hooks(
        [
            Settled(checkpointer.writer),
            saving,
            EvalHook(2, evaluate, str(folder), saving.note),
            MetricsWriter(lambda: [JSONWriter(json_file, 1)], str(folder), period=1),
        ]
    )
    start = 0
    if (folder / "last_checkpoint").exists():
        path = folder / (folder / "last_checkpoint").read_text()
        start = checkpointer.load(str(path))["iteration"] + 1
    trainer.train(start, max_iter)
    return model, evaluated, saving


def curve(folder):
    records = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    iterations = [record["iteration"] for record in records]
    assert sorted(set(iterations)) == sorted(iterations), "each iteration once"
    keys = ("total_loss", "bbox/AP")
    return {r["iteration"]: [r.get(key) for key in keys] for r in records}


@pytest.fixture
def undisturbed_run(tmp_path):
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    torch.manual_seed(3)
    model, evaluated, _ = train(folder)
    assert evaluated == [1, 3, 5, 8]
    return model, curve(folder)


def test_a_run_killed_in_an_evaluation_makes_up_for_it_and_is_the_same(tmp_path, undisturbed_run):
    torch.manual_seed(3)
    with pytest.raises(Killed):
        train(tmp_path, kill_in_evaluation=3)
    torch.manual_seed(99)
    model, evaluated, saving = train(tmp_path)
    assert evaluated == [3, 5, 8]
    assert torch.equal(model.weight, undisturbed_run[0].weight)
    assert curve(tmp_path) == undisturbed_run[1]


def test_an_evaluation_that_was_recorded_is_not_repeated(tmp_path, undisturbed_run):
    torch.manual_seed(3)
    with pytest.raises(Killed):
        train(tmp_path, kill_in_evaluation=5)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    model, evaluated, saving = train(tmp_path)
    assert evaluated == [5, 8]
    assert torch.equal(model.weight, undisturbed_run[0].weight)
    assert curve(tmp_path) == undisturbed_run[1]


def test_a_finished_run_that_goes_on_has_each_iteration_once(tmp_path):
    train(tmp_path, max_iter=4)
    assert list(curve(tmp_path)) == [0, 1, 2, 3, 4]
    _, evaluated, _ = train(tmp_path, max_iter=4)  # nothing left but the evaluation
    assert evaluated == [4] and sorted(curve(tmp_path)) == [0, 1, 2, 3, 4]
    _, evaluated, _ = train(tmp_path, max_iter=6)
    assert evaluated == [3, 6]
    assert [v[1] is not None for _, v in sorted(curve(tmp_path).items())] == [
        False, True, False, True, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_stays_also_when_the_run_was_killed_since(asynchronous, tmp_path):
    options = dict(max_to_keep=1, asynchronous=asynchronous, ap=lambda i: {1: 5.0}.get(i, 1.0))
    with pytest.raises(Killed):
        train(tmp_path, kill_in_evaluation=5, **options)
    _, _, saving = train(tmp_path, **options)
    found = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert found == ["model_0000001.pth", "model_0000007.pth", "model_final.pth"]
    assert (tmp_path / "best_checkpoint").read_text() == "model_0000001.pth"
    content = read_checkpoint(str(tmp_path / "model_final.pth"))
    assert content["trainer"]["hooks"]["CheckpointHook"]["best"] == "model_0000001.pth"


def test_a_result_that_is_no_number_is_never_the_best(tmp_path):
    train(tmp_path, ap=lambda i: math.nan)
    assert not (tmp_path / "best_checkpoint").exists()


class FullDisk:
    """Stands for `open`: from the second checkpoint on the device is full."""

    def __init__(self, error=errno.ENOSPC):
        self.error, self.checkpoints = error, 0

    def __call__(self, path, mode="r", **options):
        if mode == "wb" and "model_" in str(path):
            self.checkpoints += 1
            if self.checkpoints == 2:
                if self.error == errno.ENOSPC:
                    builtins.open(path, mode).close()
                    return builtins.open("/dev/full", mode)  # the system's own full device
                raise OSError(self.error, "Permission denied", path)
        return builtins.open(path, mode, **options)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "error, words",
    [(errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission denied")],
)
def test_a_checkpoint_that_cannot_be_written_ends_training_in_one_sentence(
    error, words, asynchronous, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint_files, "open", FullDisk(error), raising=False)
    with pytest.raises(OSError, match=f"cannot be written.*{words}.*earlier ones are intact"):
        train(tmp_path, asynchronous=asynchronous)
    assert [path.name for path in tmp_path.glob("model_*")] == ["model_0000001.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert read_checkpoint(str(tmp_path / "model_0000001.pth"))["iteration"] == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_or_training_goes_on_with_a_warning(asynchronous, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_files, "open", FullDisk(), raising=False)
    train(tmp_path, asynchronous=asynchronous, on_error="continue")
    found = sorted(path.name for path in tmp_path.glob("model_*"))
    assert found == [f"model_{i:07d}.pth" for i in (1, 5, 7)] + ["model_final.pth"]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([w for w in warnings if "No space left" in w and "Training goes on" in w]) == 1


def test_the_thread_is_waited_for_when_training_fails(tmp_path):
    model = Noisy()
    trainer = StepTrainer(
        model,
        [torch.tensor(1.0), torch.tensor(float("nan"))],
        torch.optim.SGD(model.parameters(), 0.1),
    )
    checkpointer = ATSSCheckpointer(model, str(tmp_path))
    trainer.register_hooks([CheckpointHook(checkpointer, 1, asynchronous=True)])
    with pytest.raises(FloatingPointError):
        trainer.train(0, 3)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000000.pth"]


def test_without_a_trainer_the_hook_is_called_with_iteration_and_results(tmp_path):
    checkpointer = ATSSCheckpointer(Noisy(), str(tmp_path))
    saving = CheckpointHook(checkpointer, 2, max_to_keep=1, max_iter=5)
    for iteration in range(5):
        saving.step(iteration, {"bbox": {"AP": 9.0}} if iteration == 1 else None)
        if iteration == 2:
            saving.save_now(iteration)  # a signal to stop
            saving.save_now(iteration)
    saving.finish()
    found = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert found == ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    assert (tmp_path / "best_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"period": -1}, "SOLVER.CHECKPOINT_PERIOD"),
        ({"max_to_keep": 0}, "train.checkpointer.max_to_keep .SOLVER.CHECKPOINTER.MAX_TO_KEEP."),
        ({"on_error": "ignore"}, "'ignore'.*SOLVER.CHECKPOINTER.ON_ERROR"),
    ],
)
def test_settings_that_cannot_be_are_named(options, message, tmp_path):
    checkpointer = ATSSCheckpointer(Noisy(), str(tmp_path))
    with pytest.raises(ValueError, match=message):
        CheckpointHook(checkpointer, **{"period": 1, **options})


def draw():
    return random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(2).tolist()


def test_random_states_come_back_from_a_file(tmp_path):
    draw()
    state = RandomState(seed=3)
    state.gather()
    torch.save(state.state_dict(), tmp_path / "state.pth")
    expected = [draw() for _ in range(3)]
    loaded = RandomState()
    loaded.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    loaded.restore(5)
    assert [draw() for _ in range(3)] == expected
    with undisturbed():
        after = draw()
    assert draw() == after


def test_with_another_number_of_processes_seeds_follow_from_seed_iteration_and_rank(monkeypatch):
    state = RandomState(seed=3)
    state.gather()
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    drawn = {}
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        for num_iters in (5, 6, 5):
            state.restore(num_iters)
            drawn.setdefault((rank, num_iters), []).append(str(draw()))
    assert len({one for values in drawn.values() for one in values}) == 4
    assert len(set(drawn[0, 5])) == 1


def test_a_random_state_that_was_never_saved_changes_nothing():
    torch.manual_seed(5)
    expected = draw()[-1]
    torch.manual_seed(5)
    RandomState().restore(0)
    assert draw()[-1] == expected


def in_two_processes(folder, on_error):
    """Each draws from its own generator; the main one cannot write its second checkpoint."""
    rank = comm.get_rank()
    torch.manual_seed(rank)
    if rank == 0:
        checkpoint_files.open = FullDisk()
    checkpointer = ATSSCheckpointer(Noisy(), folder)
    state = RandomState(seed=1)
    saving = CheckpointHook(checkpointer, 1, on_error=on_error, random_state=state, max_iter=4)
    outcome = "finished"
    try:
        for iteration in range(4):
            torch.rand(1)
            saving.step(iteration)
        saving.finish()
    except OSError as error:
        outcome = str(error)
    expected = torch.rand(1)
    path = f"{folder}/{'model_final' if on_error == 'continue' else 'model_0000000'}.pth"
    content = read_checkpoint(path)
    assert len(content["random_state"]["states"]) == 2
    if on_error == "continue":
        ATSSCheckpointer(Noisy(), folder, random_state=state).load(path)
        state.restore(4)
        assert torch.equal(torch.rand(1), expected)
    with open(f"{folder}/{on_error}_{rank}.txt", "w") as file:
        file.write(outcome)


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_processes_agree_on_stopping_and_keep_their_random_states(on_error, tmp_path):
    launch(in_two_processes, 2, args=(str(tmp_path), on_error), device="cpu")
    outcomes = [(tmp_path / f"{on_error}_{rank}.txt").read_text() for rank in (0, 1)]
    assert outcomes[0] == outcomes[1]
    assert ("No space left" in outcomes[0]) == (on_error == "stop")


def test_what_was_recorded_after_the_checkpoint_is_removed(tmp_path):
    lines = [f'{{"iteration": {i}, "loss": 1}}\n' for i in (0, 1, 3, 2, 4)]
    (tmp_path / "metrics.json").write_text("".join(lines) + '{"iteration": 2, "lo')
    trim_metrics(str(tmp_path), 3)
    assert (tmp_path / "metrics.json").read_text() == "".join(lines[i] for i in (0, 1, 3))
    trim_metrics(str(tmp_path / "nowhere"), 3)
