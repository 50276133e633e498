"""Runs that are interrupted and resumed: the same as those that nothing disturbed."""

import random
import signal

import pytest
import torch
from atss.checkpoint import files, read_checkpoint
from atss.data import loader
from atss.detector import ATSSDetector
from atss.training.signals import STOPPED
from stress import _thin_runs as thin_runs
from stress import kill

from detectron2.engine import TrainerBase


class Killed(BaseException):
    """Stands for a kill: nothing of the run may catch it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return thin_runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """Folders of undisturbed runs, and the images and losses of their steps, by kind."""
    found = {}

    def get(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp(kind)
            with pytest.MonkeyPatch.context() as patch:
                steps = record_steps(patch)
                thin_runs.run_in_process(kind, thin_runs.command(kind, folder, data))
            found[kind] = folder, steps
        return found[kind]

    return get


def record_steps(patch):
    """Image ids and losses of each training step, in a list that fills."""
    steps, forward = [], ATSSDetector.forward

    def recording(model, batch):
        outputs = forward(model, batch)
        if model.training:
            losses = {name: float(loss.detach()) for name, loss in outputs.items()}
            steps.append(([inputs["image_id"] for inputs in batch], losses))
        return outputs

    patch.setattr(ATSSDetector, "forward", recording)
    return steps


def kill_at(patch, owner, name, count, is_meant=lambda *_: True):
    """Let the `count`-th call of a function that is meant end as if the process was killed."""
    function, calls = getattr(owner, name), [0]

    def call(*args, **kwargs):
        calls[0] += is_meant(*args)
        if calls[0] == count and is_meant(*args):
            # A process that is killed does not come to what follows training.
            patch.setattr(TrainerBase, "after_train", lambda trainer: None)
            raise Killed
        return function(*args, **kwargs)

    patch.setattr(owner, name, call)


def assert_same(folder, reference):
    ends = [read_checkpoint(str(f / "model_final.pth")) for f in (folder, reference)]
    assert list(thin_runs.differences(*ends)) == []
    assert thin_runs.curve(folder) == thin_runs.curve(reference)


PLACES = {
    "data": (loader._MappedImages, "__getitem__", 14),  # in the fourth batch
    "forward": (ATSSDetector, "forward", 4, lambda model, _: model.training),
    "update": (torch.optim.AdamW, "step", 4),
    "checkpoint": (torch, "save", 2),
    "final checkpoint": (torch, "save", 4),  # after the last step: nothing is left but this file
    "last_checkpoint": (files, "_write_safely", 2, lambda path, _: "last_checkpoint" in path),
    "evaluation": (ATSSDetector, "forward", 1, lambda model, _: not model.training),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, place",
    [*(("lazy", place) for place in PLACES), ("yaml", "update"), ("yaml", "evaluation"),
     ("plain", "checkpoint"), ("plain", "evaluation")],
)  # fmt: skip
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(
    kind, place, data, undisturbed, tmp_path
):
    reference, steps = undisturbed(kind)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, *PLACES[place])
        thin_runs.run_in_process(kind, thin_runs.command(kind, tmp_path, data))
    with pytest.MonkeyPatch.context() as patch:
        resumed = record_steps(patch)
        thin_runs.run_in_process(kind, thin_runs.command(kind, tmp_path, data, "--resume"))
    assert len(resumed) < len(steps) and resumed == steps[len(steps) - len(resumed) :]
    assert_same(tmp_path, reference)


@pytest.mark.parametrize("kind", ["lazy", "yaml", "plain"])
def test_a_run_that_a_signal_stopped_goes_on_as_if_nothing_had_happened(
    kind, data, undisturbed, tmp_path
):
    arguments = thin_runs.command(kind, tmp_path, data, "--auto-resume")
    life = thin_runs.live(kind, arguments, ("forward", 1, 0.0), number=signal.SIGTERM)
    assert life.code == STOPPED, life.output
    assert not (tmp_path / "model_final.pth").exists()
    life = thin_runs.live(kind, arguments)
    assert life.code == 0, life.output
    ends = [read_checkpoint(str(f / "model_final.pth")) for f in (tmp_path, undisturbed(kind)[0])]
    assert list(thin_runs.differences(*ends)) == []


def test_five_kills_at_random_moments(data, undisturbed, tmp_path):
    rng, total = random.Random(1), 0
    for i in range(5):
        if total < 5:
            counts = kill.run_series(
                "lazy", tmp_path / str(i), undisturbed("lazy")[0], data, 5 - total, rng
            )
            total += sum(counts.values()) - counts["finished before"]
    assert total == 5
