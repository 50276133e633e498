"""What a detector might see and say: made ground truth and made predictions to measure with."""

import math
from typing import List, NamedTuple, Tuple

import torch
from benchmark_peers import STRIDES, anchor_generator, empty_features
from torch import Tensor

from detectron2.structures import Boxes, Instances

__all__ = ["MadePredictions", "candidate_predictions", "grid_sizes_of", "random_instances"]

# Candidates of an image above the threshold that post-processing gets, by level: about what a
# trained model gives on a crowded image. A level keeps 1000.
_CANDIDATES = (1700, 1600, 1600, 1400, 500)


def grid_sizes_of(image_size: Tuple[int, int]) -> List[Tuple[int, int]]:
    """(Hi, Wi) of the levels."""
    return [tuple(math.ceil(side / stride) for side in image_size) for stride in STRIDES]


def random_instances(
    count: int, image_size: Tuple[int, int], num_classes: int, device: torch.device, seed: int = 0
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


class MadePredictions(NamedTuple):
    """What a head might say about a batch, in the order of the anchors.

    Attributes:
        class_logits: (N, R, K).
        centerness: (N, R, 1) logits.
        boxes: (N, R, 4) the box each location means; the location lies in it.
        num_candidates: of an image, on average, after the best 1000 of each level.
    """

    class_logits: Tensor
    centerness: Tensor
    boxes: Tensor
    num_candidates: float


def candidate_predictions(
    image_size: Tuple[int, int], batch_size: int, num_classes: int, num_objects: int = 20
) -> MadePredictions:
    """Predictions around a few objects, so that suppression has its usual work.

    Class scores are either above 0.08 or below 0.02 and centerness above 0.55. So our rule (class
    score > 0.05) and FCOS's (sqrt of class score times centerness > 0.2) choose the same
    candidates, each at its own threshold.
    """
    generator = torch.Generator().manual_seed(batch_size)
    features = empty_features(grid_sizes_of(image_size), torch.device("cpu"))
    levels = anchor_generator()(features)
    centers = torch.cat([boxes.get_centers() for boxes in levels])  # (R, 2)
    sizes = [len(boxes) for boxes in levels]
    reach = torch.cat([boxes.tensor[:, 2:3] - boxes.tensor[:, 0:1] for boxes in levels]) / 2

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
        for size, count in zip(sizes, _CANDIDATES):
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
    # FCOS clips later than we do; inside the image that makes no difference.
    height, width = image_size
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2))
    centerness = 0.55 + 0.45 * rand(batch_size, len(centers), 1)
    return MadePredictions(
        scores.logit(), centerness.clamp(max=0.999).logit(), boxes, total / batch_size
    )
