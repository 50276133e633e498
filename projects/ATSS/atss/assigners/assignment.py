"""Assignments: the protocols of rules, their result, and how anchors claimed twice are resolved.

A sample-selection rule answers two questions: which anchors each object claims, and who gets an
anchor claimed twice. The first is the rule's own; `resolve_claims` answers the second for all
rules with candidates.
"""

from dataclasses import dataclass
from typing import Optional, Protocol, Sequence

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..anchor_grid import Anchors
from ..device import host_constant
from ..predictions import PredictionsAt

# Keys sort by priority; the low 32 bits hold LAST - object, so that the earlier object wins ties.
_LAST_OBJECT = 2**32 - 1


@dataclass
class Assignment:
    """What the objects of a batch learn from: S samples, each an object and an anchor.

    A rule with candidates has S = objects times candidates, a dense one S = N*R. Arrays of size
    (N, R) are made only where somebody asks for them.

    Attributes:
        image_idxs: (S,) int64, which of the N images.
        anchor_idxs: (S,) int64, which of the R anchors of that image.
        object_idxs: (S,) int64, which of the M objects of the batch, images in order; any valid
            index where not positive.
        is_positive: (S,) bool; an anchor is positive for at most one object, and never both
            positive and ignored.
        num_objects: N ints on the host, objects of each image, with sum M. A batch without objects
            has S = 0.
        num_anchors: R.
        class_targets: (S,) float in [0, 1], soft label of the object's class where positive; None
            lets the class loss decide.
        box_weights: (S,) float >= 0, weight of the box loss where positive; None lets the loss
            decide.
        is_ignored: (N, R) bool, anchors that take no part in the class loss; None for none.
    """

    image_idxs: Tensor
    anchor_idxs: Tensor
    object_idxs: Tensor
    is_positive: Tensor
    num_objects: Sequence[int]
    num_anchors: int
    class_targets: Optional[Tensor] = None
    box_weights: Optional[Tensor] = None
    is_ignored: Optional[Tensor] = None

    @property
    def matched_idxs(self) -> Tensor:
        """(N, R) int64 index into the boxes of that image; undefined unless positive."""
        first_objects = self.object_idxs.new_zeros(len(self.num_objects))
        if len(self.num_objects) > 1:
            counts = host_constant(self.num_objects[:-1], self.object_idxs.device)
            first_objects[1:] = counts.cumsum(0)
        within_image = self.object_idxs - first_objects[self.image_idxs]
        return self._dense(within_image, torch.int64)

    @property
    def match_labels(self) -> Tensor:
        """(N, R) int8, as Detectron2's `Matcher` has them: 1 positive, 0 background, -1 ignored."""
        labels = self._dense(self.is_positive.to(torch.int8), torch.int8)
        return labels if self.is_ignored is None else labels.masked_fill(self.is_ignored, -1)

    def objects_without_positives(self) -> Tensor:
        """(M,) bool, which objects no anchor learns."""
        counts = self.object_idxs.new_zeros(sum(self.num_objects))
        counts.index_add_(0, self.object_idxs, self.is_positive.to(torch.int64))
        return counts == 0

    def _dense(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of the positive samples at their anchors, (N, R), 0 elsewhere."""
        size = len(self.num_objects) * self.num_anchors
        # Samples that are not positive write to an element behind the last, which is dropped.
        flat_idxs = self.image_idxs * self.num_anchors + self.anchor_idxs
        flat_idxs = torch.where(self.is_positive, flat_idxs, size)
        dense = values.new_zeros(size + 1, dtype=dtype).index_copy_(0, flat_idxs, values.to(dtype))
        return dense[:size].view(len(self.num_objects), self.num_anchors)


class Assigner(Protocol):
    """A rule of axis 1 that sees anchors and ground truth."""

    def __call__(self, anchors: Anchors, gt_boxes: Sequence[Boxes]) -> Assignment:
        """Assign the anchors of a batch.

        Args:
            anchors: anchors of one padded image size, as a grid or as L `Boxes`.
            gt_boxes: N `Boxes`, one per image, in the same frame.
        """
        ...


class PredictionAssigner(Protocol):
    """A rule of axis 1 that also sees what the model predicts.

    Attributes:
        uses_predictions: True.
    """

    uses_predictions: bool

    def __call__(
        self,
        anchors: Anchors,
        gt_boxes: Sequence[Boxes],
        *,
        gt_classes: Sequence[Tensor],
        predictions: PredictionsAt,
        gt_boxes_on_host: Optional[Sequence[Boxes]] = None,
    ) -> Assignment:
        """Assign the anchors of a batch. Runs without gradient and outside autocast.

        Args:
            anchors, gt_boxes: see `Assigner`.
            gt_classes: N tensors (Mi,) int64 in 0..K-1.
            predictions: what the head says, at samples.
            gt_boxes_on_host: the same boxes on the CPU where somebody has them, for rules that need
                sizes that follow from boxes.
        """
        ...


def resolve_claims(
    anchor_idxs: Tensor,
    is_claimed: Tensor,
    priority: Tensor,
    num_objects: Sequence[int],
    num_anchors: int,
    image_idxs: Optional[Tensor] = None,
) -> Assignment:
    """Give every claimed anchor to the claim of highest priority; equal ones to the earlier object.

    One scatter-maximum for the whole batch: priority and object share a 64-bit key, so the result
    does not depend on the order in which a device happens to write.

    Args:
        anchor_idxs: (M, C) int64 candidate anchors of each object of the batch, indices into the R
            anchors of its image. Objects are ordered by image; an object claims an anchor once
            at most.
        is_claimed: (M, C) bool, which candidates the object wants.
        priority: (M, C) float, higher wins; must not be NaN where claimed.
        num_objects: N numbers of objects per image, with sum M.
        num_anchors: R.
        image_idxs: (M,) image of each object, if the rule has it from `images_of_objects` already.

    Returns:
        `Assignment` of S = M * C samples.
    """
    num_images = len(num_objects)
    shapes = [tuple(values.shape) for values in (anchor_idxs, is_claimed, priority)]
    assert len(set(shapes)) == 1, shapes
    assert sum(num_objects) == len(anchor_idxs), (num_objects, anchor_idxs.shape)
    device = anchor_idxs.device
    if image_idxs is None:
        image_idxs = images_of_objects(num_objects, device)
    image_idxs = image_idxs.unsqueeze(1)  # (M, 1)
    object_idxs = torch.arange(len(anchor_idxs), device=device).unsqueeze(1)  # (M, 1)

    keys = (sortable(priority) << 32) | (_LAST_OBJECT - object_idxs)  # (M, C)
    nobody = torch.iinfo(torch.int64).min
    keys = torch.where(is_claimed, keys, nobody)

    flat_idxs = image_idxs * num_anchors + anchor_idxs  # (M, C)
    best = torch.full((num_images * num_anchors,), nobody, device=device, dtype=torch.int64)
    best.scatter_reduce_(0, flat_idxs.view(-1), keys.view(-1), reduce="amax")
    is_positive = is_claimed & (best[flat_idxs] == keys)
    return Assignment(
        image_idxs=image_idxs.expand_as(anchor_idxs).reshape(-1),
        anchor_idxs=anchor_idxs.reshape(-1),
        object_idxs=object_idxs.expand_as(anchor_idxs).reshape(-1),
        is_positive=is_positive.view(-1),
        num_objects=num_objects,
        num_anchors=num_anchors,
    )


def images_of_objects(num_objects: Sequence[int], device: torch.device) -> Tensor:
    """Image of every object of a batch.

    Args:
        num_objects: N numbers of objects per image, with sum M.
        device: where the result lives.

    Returns:
        (M,) int64 in 0..N-1.
    """
    images = torch.arange(len(num_objects), device=device)
    # The size of the result is given, so that the host does not wait for it.
    return images.repeat_interleave(
        host_constant(num_objects, device), output_size=sum(num_objects)
    )


def assign_all_anchors(
    object_idxs: Tensor,
    is_positive: Tensor,
    num_objects: Sequence[int],
    is_ignored: Optional[Tensor] = None,
) -> Assignment:
    """Samples of a dense rule: every anchor of every image, with the object it is matched to.

    Args:
        object_idxs: (N, R) int64, which of the M objects of the batch; any index in 0..M-1 where
            not positive.
        is_positive: (N, R) bool.
        num_objects: N numbers of objects per image, with sum M.
        is_ignored: (N, R) bool, disjoint from `is_positive`, or None for none.

    Returns:
        `Assignment` of S = N * R samples; 0 for a batch without objects.
    """
    num_anchors = is_positive.shape[1]
    if sum(num_objects) == 0:
        object_idxs, is_positive = object_idxs[:0], is_positive[:0]
    images = torch.arange(len(is_positive), device=is_positive.device).view(-1, 1)
    anchors = torch.arange(num_anchors, device=is_positive.device)
    return Assignment(
        image_idxs=images.expand_as(is_positive).reshape(-1),
        anchor_idxs=anchors.expand_as(is_positive).reshape(-1),
        object_idxs=object_idxs.reshape(-1),
        is_positive=is_positive.reshape(-1),
        num_objects=num_objects,
        num_anchors=num_anchors,
        is_ignored=is_ignored,
    )


def sortable(values: Tensor) -> Tensor:
    """Integers that sort as the floats do, so that the low half of a 64-bit key can break ties.

    Args:
        values: (...) float, not NaN.

    Returns:
        (...) int64 in the range of int32.
    """
    # Sorted as integers, the bits of non-negative floats keep their order; those of negative floats
    # do once all but the sign are flipped.
    bits = values.float().contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)


def concatenate_boxes(gt_boxes: Sequence[Boxes], device: torch.device) -> Tensor:
    """Boxes of all images of a batch in one tensor.

    Args:
        gt_boxes: N `Boxes` in pixels of the padded input.
        device: where the result lives, also for a batch of no images.

    Returns:
        (M, 4) float32 xyxy.
    """
    boxes = [boxes.tensor.to(device, torch.float32) for boxes in gt_boxes]
    return torch.cat(boxes) if boxes else torch.zeros((0, 4), device=device)
