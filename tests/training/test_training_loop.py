"""One step of training."""

import pytest
import torch
from atss.training import loop, share_step
from atss.training.loop import StepTrainer
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.engine import hooks
from detectron2.utils.events import EventStorage


class Line(nn.Module):
    """loss = weight * batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": self.weight * batch[0]["image"]}


def make_trainer(batches, dtype=None):
    model = Line().train()
    batches = [[{"image": value}] for value in batches]
    return model, StepTrainer(model, batches, torch.optim.SGD(model.parameters(), 0.1), dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_moves_the_weights_and_records_the_loss(dtype):
    model, trainer = make_trainer([torch.tensor(2.0)], dtype)
    with EventStorage() as storage:
        trainer.iter = 0
        trainer.run_step()
    assert model.weight.item() == pytest.approx(1 - 0.1 * 2)
    assert storage.latest()["total_loss"][0] == pytest.approx(2.0)


def test_processes_agree_on_the_losses_before_the_update(monkeypatch):
    model, trainer = make_trainer([torch.tensor(2.0)])
    seen = []

    def share(*arguments):
        seen.append((model.weight.item(), model.weight.grad.item()))
        return share_step(*arguments)

    monkeypatch.setattr(loop, "share_step", share)
    with EventStorage():
        trainer.iter = 0
        trainer.run_step()
    assert seen == [(1.0, 2.0)] and model.weight.item() == pytest.approx(0.8)


def test_a_loss_that_is_not_finite_stops_training_before_weights_are_saved(tmp_path):
    batches = [torch.tensor(1.0), torch.tensor(float("nan"))]
    model, trainer = make_trainer(batches)
    checkpointer = Checkpointer(model, str(tmp_path))
    trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, period=1)])
    with pytest.raises(FloatingPointError):
        trainer.train(0, 3)
    (saved,) = tmp_path.glob("*.pth")  # of the first step only
    weight = torch.load(saved, weights_only=True)["model"]["weight"]
    assert weight.item() == pytest.approx(0.9)
