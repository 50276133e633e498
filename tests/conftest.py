"""What all tests share: seeds, one thread, the golden data and its mapping to our coordinates."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

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
from atss.predictions import DensePredictions
from atss.targets import Targets

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import DeformConv
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import setup_logger

GOLDEN = Path(__file__).parent / "golden"
REPO = Path(__file__).parents[1]
LOGGING_PACKAGES = ("atss", "detectron2", "fvcore")
STRIDES = (8, 16, 32, 64, 128)

# Tools run in subprocesses; two threads each would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


try:
    DeformConv(1, 1, 1)
    HAS_DEFORM_CONV = True
except ImportError:
    HAS_DEFORM_CONV = False
needs_deform_conv = pytest.mark.skipif(
    not HAS_DEFORM_CONV, reason="this Detectron2 has no compiled part, so it has no DeformConv"
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def restored_catalogs():
    """Leaves Detectron2's global catalogs as they were."""
    before = [(catalog, dict(catalog.data)) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, entries in before:
        catalog.data = entries


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


def golden_cases(file: str) -> Iterator[Tuple[Dict, Dict[str, torch.Tensor]]]:
    """Settings and tensors of every case of a golden file."""
    with np.load(GOLDEN / f"{file}.npz") as archive:
        for case in json.loads(str(archive["cases"])):
            prefix = case["name"] + "/"
            yield (
                case,
                {
                    key[len(prefix) :]: torch.from_numpy(archive[key])
                    for key in archive.files
                    if key.startswith(prefix)
                },
            )


def grown(boxes: torch.Tensor) -> torch.Tensor:
    """Boxes of inclusive pixels in continuous coordinates: half a pixel larger on each side."""
    return boxes.float() + torch.tensor([-0.5, -0.5, 0.5, 0.5])


def golden_grid(fields: Dict[str, torch.Tensor], grow: bool = True) -> AnchorGrid:
    """The grid of a golden case; its cell anchors lie around half a stride instead of 0."""
    cells = [
        (grown(cell) if grow else cell) - float(stride) / 2
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


def at_anchors(assignment, values: torch.Tensor, fill: float = 0) -> torch.Tensor:
    """(N, R, ...) values (S, ...) of the positive samples at their anchors, `fill` elsewhere."""
    shape = (*assignment.matched_idxs.shape, *values.shape[1:])
    dense = torch.full(shape, fill, dtype=values.dtype)
    kept = assignment.is_positive
    dense[assignment.image_idxs[kept], assignment.anchor_idxs[kept]] = values[kept]
    return dense


def labels_of(targets: Targets, num_classes: int) -> torch.Tensor:
    """(N, R) class of each anchor: 0..K-1, K for background, -1 for ignored."""
    labels = at_anchors(targets.assignment, targets.classes, fill=num_classes)
    is_ignored = targets.assignment.is_ignored
    return labels if is_ignored is None else labels.masked_fill(is_ignored, -1)


def boxes_of(targets: Targets) -> torch.Tensor:
    """(N, R, 4) box that each positive anchor learns, 0 elsewhere."""
    return at_anchors(targets.assignment, targets.boxes)


def feature_maps(height, width, num_images=1, channels=1, strides=STRIDES) -> List[torch.Tensor]:
    """Random features of images of the given size."""
    sizes = [(-(-height // s), -(-width // s)) for s in strides]
    return [torch.rand(num_images, channels, *size) for size in sizes]


def random_predictions(
    grid_sizes, num_images, num_classes, num_anchors=1, with_quality=True, scale=0.5
) -> DensePredictions:
    """Normally distributed maps of all levels."""
    logits, deltas, quality = (
        [scale * torch.randn(num_images, num_anchors * depth, *size) for size in grid_sizes]
        for depth in (num_classes, 4, 1)
    )
    return DensePredictions(logits, deltas, quality if with_quality else None, num_anchors)


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


def shapes_of(model) -> Dict[str, Tuple[int, ...]]:
    """Names and shapes of all parameters and buffers."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def assert_every_parameter_learns(model):
    """Every trainable parameter has a finite gradient."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def saved_and_loaded(scripted):
    """A scripted or traced module after a trip through a file."""
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


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
