"""Who wins an anchor that several objects claim?

A sample-selection rule answers two questions: which anchors each object claims, and who wins an
anchor claimed twice. The first is the rule's own; `resolve_claims` answers the second for all of
them. `Assignment` is what every rule returns.
"""

from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from torch import Tensor

from detectron2.structures import Boxes

from ..device import host_constant

__all__ = [
    "Assignment",
    "Claims",
    "concatenate_boxes",
    "resolve_claims",
    "sortable",
]

# Low half of a claim's key: counts down, so that of two equal priorities the earlier object wins.
_LAST_OBJECT = 2**32 - 1


@dataclass
class Claims:
    """The sparse form of an assignment: each object with its C candidate anchors.

    Attributes:
        image_idxs: (M,) int64 image of each object.
        anchor_idxs: (M, C) int64 candidate anchors, indices into the R anchors of the image.
        is_won: (M, C) bool, whether that anchor is a positive of that object. Every positive of the
            batch appears exactly once.
        places: (M, C) int64, where in the flattened (N * R,) the won ones lie; N * R, one behind
            the last, for the others.
    """

    image_idxs: Tensor
    anchor_idxs: Tensor
    is_won: Tensor
    places: Tensor

    def objects_without_positives(self) -> Tensor:
        """Number of objects that no anchor learns, a 0-dim int64 tensor (no wait for the GPU)."""
        return (~self.is_won.any(dim=1)).sum()


@dataclass
class Assignment:
    """Which object each anchor of a batch learns.

    Attributes:
        matched_idxs: (N, R) int64 index into that image's boxes; undefined unless positive.
        match_labels: (N, R) int8, as Detectron2's `Matcher` has them: 1 positive, 0 background,
            -1 ignored.
        claims: the same in sparse form, from rules with few candidates per object; else None.
    """

    matched_idxs: Tensor
    match_labels: Tensor
    claims: Optional[Claims] = None


def resolve_claims(
    anchor_idxs: Tensor,
    is_claimed: Tensor,
    priority: Tensor,
    num_objects: Sequence[int],
    num_anchors: int,
) -> Assignment:
    """Give every claimed anchor to the claim of highest priority; equal ones to the earlier object.

    One scatter-maximum for the whole batch: priority and object share a 64-bit key, so the result
    does not depend on the order in which a device happens to write.

    Args:
        anchor_idxs: (M, C) int64 candidate anchors of each object of the batch, indices into the R
            anchors of its image. Objects are ordered by image; an object names an anchor once.
        is_claimed: (M, C) bool, which candidates the object wants.
        priority: (M, C) float, higher wins; must not be NaN where claimed.
        num_objects: N numbers of objects per image, with sum M.
        num_anchors: R.

    Returns:
        `Assignment` of N images, with its sparse form.
    """
    num_images = len(num_objects)
    assert anchor_idxs.shape == is_claimed.shape == priority.shape, (
        anchor_idxs.shape,
        is_claimed.shape,
        priority.shape,
    )
    assert sum(num_objects) == len(anchor_idxs), (num_objects, anchor_idxs.shape)
    device = anchor_idxs.device

    positions = [(image, i) for image, n in enumerate(num_objects) for i in range(n)]
    positions = host_constant(positions, device).view(-1, 2)
    image_idxs, object_idxs = positions.unbind(dim=1)  # (M,) each; the second within its image

    keys = (sortable(priority) << 32) | (_LAST_OBJECT - object_idxs).unsqueeze(1)  # (M, C)
    nobody = torch.iinfo(torch.int64).min
    keys = torch.where(is_claimed, keys, nobody)

    flat_idxs = image_idxs.unsqueeze(1) * num_anchors + anchor_idxs  # (M, C)
    last = num_images * num_anchors
    best = torch.full((last + 1,), nobody, device=device, dtype=torch.int64)
    best.scatter_reduce_(0, flat_idxs.view(-1), keys.view(-1), reduce="amax")
    is_won = is_claimed & (best[flat_idxs] == keys)

    # Few anchors are won: only those are visited. Claims that lost write to an element behind the
    # last, which is then dropped.
    places = torch.where(is_won, flat_idxs, last)
    matched_idxs = best.zero_()  # its memory is at hand
    matched_idxs[places] = object_idxs.unsqueeze(1)
    match_labels = torch.zeros(last + 1, device=device, dtype=torch.int8)
    match_labels.index_fill_(0, places.view(-1), 1)
    return Assignment(
        matched_idxs=matched_idxs[:last].view(num_images, num_anchors),
        match_labels=match_labels[:last].view(num_images, num_anchors),
        claims=Claims(image_idxs, anchor_idxs, is_won, places),
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
