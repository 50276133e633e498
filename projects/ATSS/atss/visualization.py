"""Pictures of detections, assignments and training curves.

Pictures are (H, W, 3) uint8 arrays in BGR, OpenCV's order, so that `cv2.imwrite` can write them
without conversion.
"""

from collections import defaultdict
from typing import Dict, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
import torch

from detectron2.structures import Boxes

from .anchor_grid import AnchorGrid
from .assigners import Assignment
from .geometry import box_centers

_FONT = cv2.FONT_HERSHEY_SIMPLEX
# BGR; distinct on dark and light backgrounds.
_COLORS = (
    (60, 76, 231), (113, 204, 46), (219, 152, 52), (18, 156, 243), (182, 89, 155),
    (15, 196, 241), (156, 188, 26), (180, 105, 255), (255, 255, 0), (200, 200, 200),
)  # fmt: skip


def _color(index: int) -> Tuple[int, int, int]:
    return _COLORS[index % len(_COLORS)]


def draw_boxes(
    image: np.ndarray,
    boxes: Union[np.ndarray, torch.Tensor],
    classes: Sequence[int],
    texts: Sequence[str],
    thickness: int = 1,
) -> np.ndarray:
    """Labelled boxes on an image, coloured by class.

    Args:
        image: (H, W, 3) uint8; not changed.
        boxes: (M, 4) x1, y1, x2, y2 in pixels.
        classes: M class ids, for the colour.
        texts: M labels; an empty string draws none.
        thickness: of the lines, in pixels.

    Returns:
        (H, W, 3) uint8.
    """
    picture = np.ascontiguousarray(image).copy()
    for box, class_id, text in zip(np.asarray(boxes, dtype=np.float64), classes, texts):
        x1, y1, x2, y2 = (int(round(value)) for value in box)
        color = _color(int(class_id))
        cv2.rectangle(picture, (x1, y1), (x2, y2), color, thickness, cv2.LINE_AA)
        if text:
            (width, height), base = cv2.getTextSize(text, _FONT, 0.33, 1)
            top = max(y1 - height - base, 0)
            left = min(max(x1, 0), max(picture.shape[1] - width, 0))
            cv2.rectangle(picture, (left, top), (left + width, top + height + base), color, -1)
            cv2.putText(picture, text, (left, top + height), _FONT, 0.33, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def draw_detections(
    image: np.ndarray,
    gt_boxes: torch.Tensor,
    gt_classes: Sequence[int],
    pred_boxes: torch.Tensor,
    pred_classes: Sequence[int],
    scores: Sequence[float],
    class_names: Sequence[str],
    score_thresh: float = 0.5,
) -> np.ndarray:
    """Ground truth on the left, detections on the right.

    Args:
        image: (H, W, 3) uint8 BGR.
        gt_boxes, gt_classes: (M, 4) x1, y1, x2, y2 in pixels of the image, and M class ids.
        pred_boxes, pred_classes, scores: of D detections, in the same frame.
        class_names: names by class id.
        score_thresh: detections with a lower score are left out.

    Returns:
        (H, 2 * W + 4, 3) uint8 BGR.
    """
    truth = draw_boxes(image, gt_boxes, gt_classes, [class_names[int(c)] for c in gt_classes])
    keep = [i for i, score in enumerate(scores) if score >= score_thresh]
    found = draw_boxes(
        image,
        pred_boxes[keep],
        [pred_classes[i] for i in keep],
        [f"{class_names[int(pred_classes[i])]} {100 * float(scores[i]):.0f}" for i in keep],
    )
    return tile((truth, found), columns=2)


def draw_assignment(
    image: np.ndarray,
    anchors: Union[AnchorGrid, Sequence[Boxes]],
    assignment: Assignment,
    gt_boxes: Boxes,
    index: int = 0,
    level_names: Optional[Sequence[str]] = None,
) -> np.ndarray:
    """Positive anchors of each object, one panel per pyramid level (Sec. 4.1).

    An object has the same colour in all panels. A dot is the centre of a positive anchor, the thin
    box around it the anchor; dark crosses are ignored anchors. Objects without positives are
    dashed, in white.

    Args:
        image: (H, W, 3) uint8 BGR.
        anchors: of the image, padded or not; the first L levels are enough.
        assignment: of a batch with this image.
        gt_boxes: the objects of the image, in pixels.
        index: number of the image in the batch.
        level_names: L titles of the panels; by default "level 1" and so on.

    Returns:
        (H + 22, L * (W + 4) - 4, 3) uint8 BGR.
    """
    levels = anchors.boxes if isinstance(anchors, AnchorGrid) else anchors
    all_labels = assignment.match_labels[index].cpu()
    all_matched = assignment.matched_idxs[index].cpu()
    learned = set(all_matched[all_labels == 1].tolist())
    sizes = [len(level) for level in levels]
    by_level = (values[: sum(sizes)].split(sizes) for values in (all_labels, all_matched))
    dimmed = cv2.addWeighted(image, 0.45, np.full_like(image, 20), 0.55, 0)
    panels: List[np.ndarray] = []
    for i, (level, labels, matched) in enumerate(zip(levels, *by_level)):
        is_positive = labels == 1
        objects = matched[is_positive].tolist()
        boxes = level.tensor.cpu()
        panel = dimmed.copy()
        for center in box_centers(boxes[labels < 0]).int().tolist():
            cv2.drawMarker(panel, tuple(center), (90, 90, 90), cv2.MARKER_TILTED_CROSS, 4, 1)
        outlined = panel.copy()
        for box, object_idx in zip(boxes[is_positive].round().int().tolist(), objects):
            cv2.rectangle(outlined, tuple(box[:2]), tuple(box[2:]), _color(object_idx), 1)
        panel = cv2.addWeighted(outlined, 0.35, panel, 0.65, 0)
        for object_idx, box in enumerate(gt_boxes.tensor.cpu().round().int().tolist()):
            if object_idx in learned:
                cv2.rectangle(panel, tuple(box[:2]), tuple(box[2:]), _color(object_idx), 2)
            else:
                _draw_dashed(panel, box)
        centers = box_centers(boxes[is_positive]).round().int().tolist()
        for center, object_idx in zip(centers, objects):
            cv2.circle(panel, tuple(center), 3, _color(object_idx), -1, cv2.LINE_AA)
            cv2.circle(panel, tuple(center), 3, (0, 0, 0), 1, cv2.LINE_AA)
        name = level_names[i] if level_names else f"level {i + 1}"
        panels.append(with_title(panel, f"{name}: {len(objects)} positive"))
    return tile(panels, columns=len(panels))


def _draw_dashed(picture: np.ndarray, box: Sequence[int]) -> None:
    x1, y1, x2, y2 = box
    for start in range(0, max(x2 - x1, y2 - y1), 6):
        stop = start + 3
        for y in (y1, y2):
            cv2.line(picture, (min(x1 + start, x2), y), (min(x1 + stop, x2), y), (255, 255, 255), 1)
        for x in (x1, x2):
            cv2.line(picture, (x, min(y1 + start, y2)), (x, min(y1 + stop, y2)), (255, 255, 255), 1)


def with_title(image: np.ndarray, title: str) -> np.ndarray:
    """The picture below a white bar of 22 pixels with its title."""
    bar = np.full((22, image.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, title, (4, 15), _FONT, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate((bar, image), axis=0)


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """One picture of several, arranged row by row; smaller ones are padded with white.

    Args:
        images: at least one (Hi, Wi, 3) uint8.
        columns: pictures in a row.
        gap: white pixels between them.

    Returns:
        (H, W, 3) uint8.
    """
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return sheet


def plot_training(metrics: Sequence[Dict[str, float]], path: str, title: str = "") -> None:
    """A PNG of losses and AP over iterations.

    Args:
        metrics: records of Detectron2's metrics.json: "iteration", losses by name, and "bbox/AP",
            "bbox/AP50", "bbox/AP75" where the model was evaluated.
        path: file to write.
        title: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = defaultdict(list)
    for record in metrics:
        for name, value in record.items():
            points[name].append((record["iteration"], value))
    figure, (loss_axis, ap_axis) = plt.subplots(1, 2, figsize=(10, 4))
    for name in sorted(points):
        if "loss" in name:
            width = 2 if name == "total_loss" else 1
            loss_axis.plot(*zip(*points[name]), label=name, linewidth=width)
        elif name in ("bbox/AP", "bbox/AP50", "bbox/AP75"):
            ap_axis.plot(*zip(*points[name]), marker="o", label=name.split("/")[1])
    loss_axis.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
    ap_axis.set(xlabel="iteration", ylabel="AP (%), val split", ylim=(0, 100))
    for axis in (loss_axis, ap_axis):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
