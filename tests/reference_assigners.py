"""The dense rules of axis 1 as plain loops, written from the papers, and layouts to try them on.

Nothing here comes from `atss.assigners`. Boxes are tuples of floats on a grid of half pixels, so
that ties and boundaries are met often and areas are exact; quotients are rounded to float32, as any
float32 implementation rounds them.
"""

import math
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from reference import area, iou, ltrb

from detectron2.structures import Boxes

Box = Tuple[float, float, float, float]


class Layout(NamedTuple):
    """Anchors of a small image, level by level, and the objects of a batch of images."""

    strides: List[float]
    grid_sizes: List[Tuple[int, int]]
    cells: List[List[Box]]
    images: List[List[Box]]

    def anchors(self) -> List[Tuple[Box, float, int]]:
        """All anchors with the stride and the index of their level, in Detectron2's order."""
        found = []
        levels = zip(self.strides, self.grid_sizes, self.cells)
        for level, (stride, (height, width), cells) in enumerate(levels):
            for row in range(height):
                for column in range(width):
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    for x1, y1, x2, y2 in cells:
                        found.append(((x + x1, y + y1, x + x2, y + y2), stride, level))
        return found


def random_layout(seed: int) -> Layout:
    """One to three images with none to five objects, two or three levels, one to three anchors."""
    rng = np.random.default_rng(seed)
    size = rng.integers(24, 72, 2)
    strides = [8.0, 16.0, 32.0][: rng.integers(2, 4)]
    grid_sizes = [tuple(int(-(-side // stride)) for side in size) for stride in strides]
    scale = float(rng.choice([2, 4]))
    shapes = [(1.0, 1.0), (0.5, 2.0), (2.0, 0.5)][: rng.integers(1, 4)]
    cells = [
        [(-s * scale * w / 2, -s * scale * h / 2, s * scale * w / 2, s * scale * h / 2)
         for w, h in shapes]
        for s in strides
    ]  # fmt: skip
    images = []
    for _ in range(rng.integers(1, 4)):
        boxes: List[Box] = []
        for _ in range(rng.integers(0, 6)):
            if boxes and rng.random() < 0.2:
                boxes.append(boxes[0])  # the same box twice: every rule has to break a tie
                continue
            center = rng.integers(-8, 2 * size[::-1] + 8) / 2  # some outside the image
            extent = np.exp(rng.uniform(math.log(2), math.log(80), 2)).round() / 2
            boxes.append(tuple(float(v) for v in (*(center - extent), *(center + extent))))
        images.append(boxes)
    return Layout(strides, grid_sizes, cells, images)


def to_boxes(boxes: Sequence[Box]) -> Boxes:
    return Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))


def iou_rule(layout: Layout, low, high, allow_low_quality, center_in_gt, margin):
    """RetinaNet: per image, the object of each anchor, -1 for background and -2 for ignored."""
    anchors = [anchor for anchor, _, _ in layout.anchors()]
    low, high = np.float32(low), np.float32(high)
    result = []
    for boxes in layout.images:
        table = [[np.float32(iou(box, anchor)) for box in boxes] for anchor in anchors]
        best = [max(row[g] for row in table) for g in range(len(boxes))]
        assigned = []
        for anchor, row in zip(anchors, table):
            if not boxes:
                assigned.append(-1)
                continue
            top = max(row)
            state = -1 if top < low else (-2 if top < high else row.index(top))
            if allow_low_quality and any(
                row[g] == best[g] and best[g] > 0 for g in range(len(boxes))
            ):
                state = row.index(top)
            if state >= 0 and center_in_gt and not min(ltrb(anchor, boxes[state])) > margin:
                state = -2
            assigned.append(state)
        result.append(assigned)
    return result


def ssc_rule(layout: Layout, size_ranges, radius, margin):
    """FCOS: per image, the object of each anchor or -1."""
    result = []
    for boxes in layout.images:
        assigned = []
        for anchor, stride, level in layout.anchors():
            least, largest = size_ranges[level]
            wanting = []
            for g, box in enumerate(boxes):
                left, top, right, bottom = sides = ltrb(anchor, box)
                if not min(sides) > margin or not least <= max(sides) <= largest:
                    continue
                off_center = max(abs(left - right), abs(top - bottom)) / 2
                if radius is None or off_center < radius * stride:
                    wanting.append((area(box), g))
            assigned.append(min(wanting)[1] if wanting else -1)
        result.append(assigned)
    return result


def topk_rule(layout: Layout, topk, margin):
    """The k best of all levels: per image, the object of each anchor or -1."""
    anchors = [anchor for anchor, _, _ in layout.anchors()]
    result = []
    for boxes in layout.images:
        squares = [
            [
                ((s[0] - s[2]) / 2) ** 2 + ((s[1] - s[3]) / 2) ** 2
                for s in (ltrb(a, box) for a in anchors)
            ]
            for box in boxes
        ]
        roots = np.sqrt(np.array(squares, dtype=np.float32))
        owner: List[Tuple[float, int]] = [(-1.0, -1)] * len(anchors)
        for g, box in enumerate(boxes):
            ious = np.array([iou(box, anchor) for anchor in anchors], dtype=np.float32)
            scores = ious - roots[g] / roots.max() * np.float32(0.001)
            order = sorted(range(len(anchors)), key=lambda r: (-scores[r], r))
            for r in order[:topk]:
                if min(ltrb(anchors[r], box)) > margin and ious[r] > owner[r][0]:
                    owner[r] = (float(ious[r]), g)
        result.append([g for _, g in owner])
    return result


def object_of_each_anchor(assignment) -> List[List[int]]:
    """An `Assignment` in the form of the rules above: object, -1 background, -2 ignored."""
    labels = assignment.match_labels
    owners = assignment.matched_idxs.masked_fill(labels == 0, -1).masked_fill(labels < 0, -2)
    return owners.tolist()
