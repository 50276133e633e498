"""Does an exported file say what the model says? A comparison on images of several sizes."""

import os
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from .detector import ATSSDetector
from .export_modules import PathLike, RawHeads, Size, detect_as_tensors, output_names
from .export_operators import load_onnx
from .export_samples import resized_and_rolled, synthetic_image

__all__ = [
    "CheckRow",
    "check_sizes",
    "compare_with_eager",
    "format_table",
    "load_exported",
    "match_detections",
]

BOX_TOLERANCE = 0.01  # pixels
SCORE_TOLERANCE = 1e-4
TIE_TOLERANCE = 1e-6

Run = Callable[[Tensor], Sequence[Tensor]]


class CheckRow(NamedTuple):
    """One image, or batch, of a check: largest differences from the model.

    Attributes:
        size: (height, width) in pixels.
        num_eager, num_exported: detections, or anchors of raw heads.
        box_difference: of any coordinate, in pixels.
        score_difference: of any score, and of any mask value.
        num_ties: detections that the file chose differently among equal scores.
        num_unmatched: detections of either side that the other lacks.
    """

    size: Size
    num_eager: int
    num_exported: int
    box_difference: float
    score_difference: float
    num_ties: int
    num_unmatched: int

    @property
    def passed(self) -> bool:
        """Same number, boxes within 0.01 px, scores within 1e-4, exact ties aside."""
        return (
            self.num_eager == self.num_exported
            and self.num_unmatched == 0
            and self.box_difference <= BOX_TOLERANCE
            and self.score_difference <= SCORE_TOLERANCE
        )


def load_exported(path: PathLike, export_format: str) -> Run:
    """What a user of the file would call.

    Args:
        path: of the file.
        export_format: "torchscript", "export" or "onnx".

    Returns:
        Function images (N, 3, H, W) on the CPU -> tensors of `output_names`.
    """
    if export_format == "onnx":
        session = load_onnx(path)
        return lambda images: [
            torch.as_tensor(output) for output in session.run(None, {"images": images.numpy()})
        ]
    if export_format == "export":
        return torch.export.load(os.fspath(path)).module()
    return torch.jit.load(os.fspath(path), map_location="cpu")


def check_sizes(example_size: Size) -> List[Size]:
    """Four (height, width): odd and not divisible by 32, small, portrait, larger than traced."""
    height, width = example_size
    return [(237, 331), (97, 120), (310, 200), (height + height // 2 + 7, width + width // 2 + 3)]


@torch.no_grad()
def compare_with_eager(
    model: nn.Module,
    run: Run,
    sizes: Sequence[Size],
    batch_size: int = 1,
    raw_heads: bool = False,
    image: Optional[Tensor] = None,
) -> List[CheckRow]:
    """Run an exported file beside its model.

    Args:
        model: on the CPU.
        run: see `load_exported`.
        sizes: (height, width) of each batch.
        batch_size: N of the file.
        raw_heads: whether the file holds `RawHeads`.
        image: (3, H, W) in 0..255, brought to each size; synthetic images by default.

    Returns:
        One row per size.
    """
    was_training = model.training
    model.eval()
    reference = RawHeads(model) if raw_heads else None
    rows = []
    for i, size in enumerate(sizes):
        if image is None:
            seeds = range(i * batch_size, (i + 1) * batch_size)
            images = torch.stack([synthetic_image(size, seed) for seed in seeds])
        else:
            images = torch.stack(
                [resized_and_rolled(image, size, shift) for shift in range(batch_size)]
            )
        found = run(images)
        if raw_heads:
            score_thresh = model.proposal_generator.score_thresh
            rows.append(_compare_raw(size, reference(images), found, score_thresh))
        else:
            names = output_names(model, batch_size)
            row = match_detections(size, detect_as_tensors(model, images), found, names)
            if row.num_unmatched and isinstance(model, ATSSDetector):
                candidates = _before_nms(model, images)
                expected = detect_as_tensors(model, images)
                row = match_detections(size, expected, found, names, candidates)
            rows.append(row)
    model.train(was_training)
    return rows


def format_table(rows: Sequence[CheckRow]) -> str:
    """The rows as a table for people."""
    lines = [
        f"{'height x width':>14}  {'eager':>7}  {'exported':>8}  {'boxes, px':>9}  {'scores':>8}  "
        f"{'ties':>4}"
    ]
    for row in rows:
        verdict = "ok" if row.passed else "FAILED"
        if row.num_unmatched:
            verdict += f", {row.num_unmatched} without a partner"
        size = f"{row.size[0]} x {row.size[1]}"
        lines.append(
            f"{size:>14}  {row.num_eager:>7}  {row.num_exported:>8}  {row.box_difference:>9.5f}  "
            f"{row.score_difference:>8.1e}  {row.num_ties:>4}  {verdict}"
        )
    return "\n".join(lines)


def match_detections(
    size: Size,
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    names: Sequence[str],
    candidates: Optional[Sequence[Tensor]] = None,
) -> CheckRow:
    """Find each detection of one side on the other, whatever the order of nearly equal scores.

    Args:
        size: (height, width) of the image.
        expected: tensors of the model.
        found: tensors of the file.
        names: of both, see `output_names`.
        candidates: what the model had to choose from; a detection of the file which is one of
            these, and whose score equals that of one which the file lacks, is a tie.
    """
    if len(expected[0]) == 0 or len(found[0]) == 0:
        unmatched = len(expected[0]) + len(found[0])
        return CheckRow(size, len(expected[0]), len(found[0]), 0.0, 0.0, 0, unmatched)
    cost, box_distance, score_distance = _distances(expected, found, names)
    pairs = _match(cost.numpy())
    rows, columns = [list(idxs) for idxs in zip(*pairs)] if pairs else ([], [])
    num_ties = 0
    if candidates is not None:
        missing = _others(expected, rows)
        extra = _others(found, columns)
        is_candidate = [j for j, _ in _match(_distances(extra, candidates, names)[0].numpy())]
        scores = sorted(missing[names.index("scores")].tolist())
        other_scores = sorted(extra[names.index("scores")][is_candidate].tolist())
        num_ties = sum(abs(a - b) <= TIE_TOLERANCE for a, b in zip(scores, other_scores))
    return CheckRow(
        size,
        len(expected[0]),
        len(found[0]),
        float(box_distance[rows, columns].max()) if pairs else 0.0,
        float(score_distance[rows, columns].max()) if pairs else 0.0,
        num_ties,
        len(expected[0]) + len(found[0]) - 2 * len(pairs) - 2 * num_ties,
    )


def _before_nms(model: ATSSDetector, images: Tensor) -> Tuple[Tensor, ...]:
    core = model.proposal_generator
    settings = core.nms_thresh, core.detections_per_image
    core.nms_thresh, core.detections_per_image = 1.0, -1
    try:
        return detect_as_tensors(model, images)
    finally:
        core.nms_thresh, core.detections_per_image = settings


def _others(detections: Sequence[Tensor], idxs: Sequence[int]) -> List[Tensor]:
    is_other = torch.ones(len(detections[0]), dtype=torch.bool)
    is_other[list(idxs)] = False
    return [tensor[is_other] for tensor in detections]


def _distances(
    expected: Sequence[Tensor], found: Sequence[Tensor], names: Sequence[str]
) -> Tuple[Tensor, Tensor, Tensor]:
    """(D, D') cost of each pair in units of what is allowed, distance of boxes, of scores."""
    left, right = dict(zip(names, expected)), dict(zip(names, found))
    boxes, others = left["boxes"].double(), right["boxes"].double()
    box_distance = (boxes[:, None] - others[None]).abs().amax(dim=2)
    score_distance = (left["scores"][:, None] - right["scores"][None]).abs().double()
    if "masks" in left:
        masks = [fields["masks"].flatten(1).float() for fields in (left, right)]
        score_distance = score_distance.maximum(torch.cdist(*masks, p=float("inf")).double())
    cost = (box_distance / BOX_TOLERANCE).maximum(score_distance / SCORE_TOLERANCE)
    for name in ("classes", "image_idxs"):
        if name in left:  # another class or image is never a partner
            cost[left[name][:, None] != right[name][None]] = float("inf")
    return cost, box_distance, score_distance


def _match(cost: np.ndarray) -> List[Tuple[int, int]]:
    """Partners of cost at most 1, the best first, each used once."""
    pairs: List[Tuple[int, int]] = []
    cost = cost.copy()
    if cost.shape[1] == 0:
        return pairs
    for i in range(len(cost)):
        j = int(cost[i].argmin())
        if cost[i, j] <= 1:
            pairs.append((i, j))
            cost[:, j] = np.inf
    return pairs


def _compare_raw(
    size: Size, expected: Sequence[Tensor], found: Sequence[Tensor], score_thresh: float
) -> CheckRow:
    num_anchors = expected[0].shape[1]
    if any(a.shape != b.shape for a, b in zip(expected, found)):
        return CheckRow(size, num_anchors, found[0].shape[1], 0.0, 0.0, 0, num_anchors)
    scores = [(a.sigmoid() - b.sigmoid()).abs().max() for a, b in zip(expected[::2], found[::2])]
    # Boxes that can become detections; of others, far off and huge, only the least digits differ.
    is_candidate = expected[0].sigmoid().amax(dim=2) > score_thresh / 2
    boxes = (expected[1] - found[1]).abs().amax(dim=2)[is_candidate]
    box_difference = float(boxes.max()) if len(boxes) else 0.0
    return CheckRow(size, num_anchors, found[0].shape[1], box_difference, float(max(scores)), 0, 0)
