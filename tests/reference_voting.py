"""Slow twin of box voting: plain loops over boxes, without torch."""

from typing import List, Sequence, Tuple

from reference import Box, iou


def group_boxes(boxes: Sequence[Box], scores: Sequence[float], thresh: float) -> List[List[int]]:
    """Groups of indices, each led by its best box, in the order they are formed."""
    left = sorted(range(len(boxes)), key=lambda i: -scores[i])  # stable
    groups = []
    while left:
        head, others = left[0], left[1:]
        group, left = [head], []
        for i in others:
            (group if iou(boxes[head], boxes[i]) >= thresh else left).append(i)
        groups.append(group)
    return groups


def vote_boxes(
    boxes: Sequence[Box],
    scores: Sequence[float],
    classes: Sequence[int],
    thresh: float = 0.66,
    soft: bool = True,
    soft_score_thresh: float = 0.05,
) -> List[Tuple[float, int, Tuple[float, ...]]]:
    """(score, class, box) of all classes, by falling score."""
    results = []
    for k in sorted(set(classes)):
        of_class = [i for i in range(len(boxes)) if classes[i] == k]
        class_boxes = [boxes[i] for i in of_class]
        class_scores = [scores[i] for i in of_class]
        for group in group_boxes(class_boxes, class_scores, thresh):
            head = group[0]
            if len(group) == 1:
                results.append((class_scores[head], k, tuple(class_boxes[head])))
                continue
            total = sum(class_scores[i] for i in group)
            mean = tuple(
                sum(class_scores[i] * class_boxes[i][side] for i in group) / total
                for side in range(4)
            )
            results.append((class_scores[head], k, mean))
            for i in group[1:] if soft else ():
                score = class_scores[i] * (1 - iou(class_boxes[head], class_boxes[i]))
                if score >= soft_score_thresh:
                    results.append((score, k, tuple(class_boxes[i])))
    return sorted(results, key=lambda result: -result[0])
