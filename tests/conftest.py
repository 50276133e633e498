"""What all tests share: seeds, one thread, the golden data and its mapping to our coordinates."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, Tuple

import numpy as np
import pytest
import torch
from atss.anchor_grid import AnchorGrid
from atss.anchors import GridAnchorGenerator, octave_sizes
from atss.assigners import ATSSAssigner, assign_all_anchors
from atss.backbone import resnet_fpn
from atss.box_regression import Box2BoxTransform
from atss.data import ToyShapesOptions
from atss.data.toy_shapes import render_dataset, split_paths
from atss.detector import build_detector
from atss.head import ATSSHead
from atss.losses import DenseLoss
from atss.targets import Targets

from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import setup_logger

GOLDEN = Path(__file__).parent / "golden"
REPO = Path(__file__).parents[1]
LOGGING_PACKAGES = ("atss", "detectron2", "fvcore")
STRIDES = (8, 16, 32, 64, 128)

# Tools run in subprocesses; two threads each would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


def your_data(root, **options) -> Dict[str, str]:
    """A small made set as the options for your data, by their names in parsed arguments."""
    options = ToyShapesOptions(image_size=64, max_size=40, max_objects=3, **options)
    folder = render_dataset(root, options)
    return {
        f"{split}_{part}": str(getattr(split_paths(folder, split), path))
        for split in ("train", "val")
        for part, path in (("json", "json_file"), ("images", "image_root"))
    }


@pytest.fixture(autouse=True)
def logs_as_before():
    with restored_logs():
        yield


@contextlib.contextmanager
def restored_logs():
    """Undo what setting up a run changes in the loggers that all tests of a process share."""

    def state(logger):
        return logger.level, logger.propagate, list(logger.handlers)

    def loggers():
        names = list(logging.root.manager.loggerDict)
        return map(logging.getLogger, (n for n in names if n.split(".")[0] in LOGGING_PACKAGES))

    before = {logger: state(logger) for logger in loggers()}
    yield
    for logger in loggers():
        old = before.get(logger, (logging.NOTSET, True, []))
        if state(logger) != old:
            setup_logger.cache_clear()  # else the next call would add no handlers
            logger.setLevel(old[0])
            logger.propagate, logger.handlers = old[1:]


def golden_cases(file: str) -> Iterator[Tuple[Dict, Dict[str, np.ndarray]]]:
    """Settings and arrays of every case of a golden file."""
    with np.load(GOLDEN / f"{file}.npz") as archive:
        for case in json.loads(str(archive["cases"])):
            prefix = case["name"] + "/"
            yield (
                case,
                {
                    key[len(prefix) :]: archive[key]
                    for key in archive.files
                    if key.startswith(prefix)
                },
            )


def grown(boxes) -> torch.Tensor:
    """Boxes of inclusive pixels in continuous coordinates: half a pixel larger on each side."""
    return torch.as_tensor(boxes, dtype=torch.float32) + torch.tensor([-0.5, -0.5, 0.5, 0.5])


def golden_grid(fields: Dict[str, np.ndarray], grow: bool = True) -> AnchorGrid:
    """The grid of a golden case; its cell anchors lie around half a stride instead of 0."""
    cells = [
        (grown(cell) if grow else torch.as_tensor(cell)) - float(stride) / 2
        for cell, stride in zip(fields["cell_anchors"], fields["strides"])
    ]
    sizes = [(int(height), int(width)) for height, width in fields["grid_sizes"]]
    return AnchorGrid(sizes, [float(s) for s in fields["strides"]], cells)


def make_grid(height: int, width: int, num_levels: int = 5, scale: float = 8.0) -> AnchorGrid:
    """Square anchors over an image of the given size."""
    strides = STRIDES[:num_levels]
    sizes = [(-(-height // s), -(-width // s)) for s in strides]
    cells = [torch.tensor([[-1.0, -1.0, 1.0, 1.0]]) * scale * s / 2 for s in strides]
    return AnchorGrid(sizes, strides, cells)


def random_boxes(count: int, height: float, width: float, low: float = 4.0) -> torch.Tensor:
    """(count, 4) boxes with log-uniform sides, centres in the image or a little outside."""
    sides = torch.exp(torch.empty(count, 2).uniform_(np.log(low), np.log(0.9 * max(height, width))))
    centers = torch.rand(count, 2) * torch.tensor([width, height]) * 1.2 - 0.1 * width
    return torch.cat((centers - sides / 2, centers + sides / 2), dim=1)


def make_instances(boxes, classes, size=(64, 64)) -> Instances:
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4))
    instances.gt_classes = torch.as_tensor(classes, dtype=torch.int64).view(-1)
    return instances


def targets_of_anchors(labels, boxes, num_classes) -> Targets:
    """Targets from dense labels (N, R) in -1 (ignored), 0..K-1, K (background), and boxes."""
    is_positive = (labels >= 0) & (labels < num_classes)
    assignment = assign_all_anchors(
        torch.zeros_like(labels), is_positive, [1] * len(labels), labels < 0
    )
    classes = labels.clamp(0, num_classes - 1).flatten()
    return Targets(assignment, classes, boxes.reshape(-1, 4))


def labels_of(targets: Targets, num_classes: int) -> torch.Tensor:
    """(N, R) class of each anchor: 0..K-1, K for background, -1 for ignored."""
    assignment = targets.assignment
    labels = torch.full_like(assignment.matched_idxs, num_classes)
    if assignment.is_ignored is not None:
        labels[assignment.is_ignored] = -1
    places = assignment.image_idxs, assignment.anchor_idxs
    is_positive = assignment.is_positive
    labels[tuple(idxs[is_positive] for idxs in places)] = targets.classes[is_positive]
    return labels


def boxes_of(targets: Targets) -> torch.Tensor:
    """(N, R, 4) box that each positive anchor learns, 0 elsewhere."""
    assignment = targets.assignment
    boxes = torch.zeros(*assignment.matched_idxs.shape, 4)
    places = assignment.image_idxs, assignment.anchor_idxs
    is_positive = assignment.is_positive
    boxes[tuple(idxs[is_positive] for idxs in places)] = targets.boxes[is_positive]
    return boxes


def tiny_detector(**changes):
    """A detector that runs in milliseconds; parts can be replaced by keyword."""
    num_classes = changes.pop("num_classes", 3)
    transform = changes.pop("box2box_transform", Box2BoxTransform((10.0, 10.0, 5.0, 5.0)))
    head = dict(in_channels=64, num_classes=num_classes, num_convs=1)
    head.update(changes.pop("head", {}))
    loss = changes.pop("loss", {})
    parts = dict(
        backbone=resnet_fpn(
            depth=18, norm="GN", freeze_at=0, stem_out_channels=32, res2_out_channels=32,
            out_channels=64,
        ),
        head=ATSSHead(**head),
        anchor_generator=GridAnchorGenerator(
            sizes=octave_sizes(STRIDES), aspect_ratios=[1.0], strides=list(STRIDES)
        ),
        assigner=ATSSAssigner(),
        box2box_transform=transform,
        loss=DenseLoss(**{"box2box_transform": transform, "num_classes": num_classes, **loss}),
        num_classes=num_classes,
        pixel_mean=[127.0] * 3,
        pixel_std=[60.0] * 3,
    )  # fmt: skip
    parts.update(changes)
    return build_detector(**parts)


def make_input(height=64, width=96, boxes=(), classes=()):
    """One element of a batch, as Detectron2's mapper makes it."""
    return {
        "image": torch.rand(3, height, width) * 255,
        "instances": make_instances(boxes, classes, (height, width)),
        "height": height,
        "width": width,
    }


def run_tool(tool, arguments, cwd, ok=True, warnings="ignore"):
    """Output of a tool in a process of its own, which must succeed, or fail, as expected."""
    process = subprocess.run(
        [sys.executable, str(REPO / "tools" / f"{tool}.py"), *map(str, arguments)],
        cwd=cwd, env={**os.environ, "PYTHONWARNINGS": warnings}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    output = process.stdout + process.stderr
    assert (process.returncode == 0) == ok, output[-3000:]
    return output
