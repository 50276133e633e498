#!/usr/bin/env python
"""Training steps of a tiny model on batches that hypothesis makes up.

Boxes without area, far outside, huge, crowded and none at all: losses and gradients stay finite::

    python tools/stress/fuzz.py --examples 10000
"""

import argparse
import sys
import time
from typing import Any, List, Optional, Sequence, Tuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from detectron2.structures import Boxes, Instances

Object = Tuple[float, float, float, float, int]

_STARTS = st.floats(-100, 200, width=32)
_SIDES = st.one_of(
    st.floats(2**-10, 100, width=32), st.sampled_from([0.0, 1e-6, 1.0, 64.0, 1e4, 1e5])
)
_OBJECTS = st.tuples(_STARTS, _STARTS, _SIDES, _SIDES, st.integers(0, 2))
_CROWDS = st.builds(lambda one, count: [one] * count, _OBJECTS, st.integers(2, 300))
BATCHES = st.lists(st.one_of(st.lists(_OBJECTS, max_size=8), _CROWDS), min_size=1, max_size=3)


def make_batch(objects: Sequence[Sequence[Object]], size: int = 64) -> List[dict]:
    """Grey images of `size` pixels with the objects (x, y, width, height, class) of each."""
    batch = []
    for of_image in objects:
        rows = torch.tensor(of_image, dtype=torch.float32).reshape(-1, 5)
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.cat((rows[:, :2], rows[:, :2] + rows[:, 2:4]), dim=1))
        instances.gt_classes = rows[:, 4].long()
        batch.append({"image": torch.full((3, size, size), 99.0), "instances": instances})
    return batch


def check_step(model: nn.Module, objects: Sequence[Sequence[Object]]) -> str:
    """Train a step; what became of it.

    Returns:
        "trained", or "refused" where the model says in a sentence what is wrong with the boxes.

    Raises:
        AssertionError: a loss or gradient is not finite.
    """
    model.zero_grad()
    try:
        losses = model(make_batch(objects))
    except ValueError:
        return "refused"
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()), (losses, objects)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), (name, objects)
    return "trained"


def fuzz(model: nn.Module, num_examples: int) -> dict:
    """Train steps on as many batches; how many were trained and refused."""
    counts = {"trained": 0, "refused": 0}

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(BATCHES)
    def step(objects: Any) -> None:
        counts[check_step(model, objects)] += 1

    step()
    return counts


def main(args: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=10_000)
    options = parser.parse_args(args)
    from conftest import tiny_detector  # the tests' model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    counts = fuzz(tiny_detector().train(), options.examples)
    print(f"{counts} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("tools", 1)[0] + "tests")
    main()
