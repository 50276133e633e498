"""Synthetic ground truth and predictions to measure with."""

import math
from typing import List, NamedTuple, Sequence

import torch
from _reference_models import STRIDES
from torch import Tensor

from detectron2.structures import Boxes, Instances

from .cases import Size

# Candidates of an image above the threshold, by level: about as many as a trained model has on a
# crowded image. Post-processing keeps 1000 of a level.
_CANDIDATES = (1700, 1600, 1600, 1400, 500)


def grid_sizes_of(image_size: Size) -> List[Size]:
    """(Hi, Wi) of the levels P3 to P7."""
    return [tuple(math.ceil(side / stride) for side in image_size) for stride in STRIDES]


def empty_features(image_size: Size, device: torch.device) -> List[Tensor]:
    """Features without channels, (1, 0, Hi, Wi), for generators of anchors."""
    return [torch.empty(1, 0, *size, device=device) for size in grid_sizes_of(image_size)]


def random_instances(
    count: int, image_size: Size, num_classes: int, device: torch.device, seed: int = 0
) -> Instances:
    """Ground truth with sides from 10 px to most of the image, small ones as common as large."""
    generator = torch.Generator().manual_seed(1000 * count + seed)
    height, width = image_size
    extent = torch.tensor([float(width), float(height)])
    uniform = torch.rand(count, 2, generator=generator)
    sides = torch.exp(math.log(10.0) + uniform * torch.log(0.8 * extent / 10.0))
    first = torch.rand(count, 2, generator=generator) * (extent - sides)
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(torch.cat((first, first + sides), dim=1).to(device))
    classes = torch.randint(num_classes, (count,), generator=generator)
    instances.gt_classes = classes.to(device)
    return instances


class SyntheticPredictions(NamedTuple):
    """Predictions for a batch, in the order of the anchors.

    Attributes:
        class_logits: (N, R, K).
        centerness: (N, R, 1) logits.
        boxes: (N, R, 4) xyxy in pixels; each holds the center of its anchor.
        num_candidates: mean number of candidates of an image, at most 1000 of each level.
    """

    class_logits: Tensor
    centerness: Tensor
    boxes: Tensor
    num_candidates: float


def candidate_predictions(
    anchors: Sequence[Boxes],
    image_size: Size,
    batch_size: int,
    num_classes: int,
) -> SyntheticPredictions:
    """Predictions around a few objects, so that suppression has its usual work.

    Class scores are either above 0.08 or below 0.02 and centerness above 0.55. So our rule (class
    score > 0.05) and FCOS's (sqrt of class score times centerness > 0.2) choose the same
    candidates, each at its own threshold.

    Args:
        anchors: of the levels, one square per location.
        image_size: (height, width).
        batch_size: N.
        num_classes: K.
    """
    num_objects = 20  # of an image
    generator = torch.Generator().manual_seed(batch_size)
    boxes = torch.cat([level.tensor.cpu() for level in anchors])  # (R, 4)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    reach = (boxes[:, 2:3] - boxes[:, 0:1]) / 2

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    scores = rand(batch_size, len(centers), num_classes) * 0.01 + 0.001
    distances = (0.4 + rand(batch_size, len(centers), 4)) * reach
    total = 0
    for image in range(batch_size):
        instances = random_instances(
            num_objects, image_size, num_classes, torch.device("cpu"), image
        )
        objects, classes = instances.gt_boxes.tensor, instances.gt_classes
        first = 0
        for size, count in zip(map(len, anchors), _CANDIDATES):
            of = torch.randint(num_objects, (count,), generator=generator)
            low, high = objects[of, :2], objects[of, 2:]
            points = low + rand(count, 2) * (high - low)
            nearest = torch.cdist(points, centers[first : first + size]).argmin(dim=1) + first
            others = torch.randint(num_classes, (num_objects, 4), generator=generator)
            choice = torch.randint(8, (count,), generator=generator)
            other = others[of, (choice % 4)]
            scores[image, nearest, torch.where(choice < 4, classes[of], other)] = (
                0.08 + 0.85 * rand(count) ** 2
            )
            inside = torch.cat((centers[nearest] - low, high - centers[nearest]), dim=1)
            jitter = torch.exp(0.15 * torch.randn(count, 4, generator=generator))
            distances[image, nearest] = inside.clamp(min=1.0) * jitter
            total += min(1000, int((scores[image, first : first + size] > 0.05).sum()))
            first += size
    boxes = torch.cat((centers - distances[..., :2], centers + distances[..., 2:]), dim=2)
    # Boxes inside the image make it irrelevant that FCOS clips later than we do.
    height, width = image_size
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2))
    centerness = 0.55 + 0.45 * rand(batch_size, len(centers), 1)
    return SyntheticPredictions(
        scores.logit(), centerness.clamp(max=0.999).logit(), boxes, total / batch_size
    )
