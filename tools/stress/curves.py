#!/usr/bin/env python
"""Losses of 50 steps with every assigner, recorded for the tests to compare with.

A tiny model of the tests in float32, on one thread. Record anew only where training is meant to
change::

    python tools/stress/curves.py
"""

import json
import sys
from pathlib import Path
from typing import Dict, List

import torch

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tests"))

from atss.assigners import (  # noqa: E402
    ATSSAssigner,
    IoUAssigner,
    SimOTAAssigner,
    SSCAssigner,
    TopKAssigner,
)
from conftest import GOLDEN, make_input, tiny_detector  # noqa: E402

NUM_STEPS = 50
ASSIGNERS = {
    assigner.__name__: assigner
    for assigner in (ATSSAssigner, IoUAssigner, SimOTAAssigner, SSCAssigner, TopKAssigner)
}
FILE = GOLDEN / "curves.json"


def machine() -> Dict[str, str]:
    """What rounding depends on."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def losses_of(name: str, num_steps: int = NUM_STEPS) -> List[float]:
    """Total loss of each step with an assigner, by its name."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny_detector(assigner=ASSIGNERS[name]()).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    losses = []
    for step in range(num_steps):
        boxes = torch.tensor([[4.0, 4, 40, 30], [30, 20, 60, 60], [8, 8, 20, 56]])
        batch = [make_input(64, 64, boxes + step % 4, [0, 1, 2]), make_input(64, 64)]
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    curves = {name: losses_of(name) for name in ASSIGNERS}
    FILE.write_text(json.dumps({"machine": machine(), "curves": curves}, indent=1) + "\n")
    print({name: (curve[0], curve[-1]) for name, curve in curves.items()})


if __name__ == "__main__":
    main()
