"""Does an exported file say what the model says? A comparison on images of several sizes."""

import os
from typing import Callable, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from ..detector import ATSSDetector
from .matching import BOX_TOLERANCE, SCORE_TOLERANCE, Choice, match_detections
from .modules import PathLike, RawHeads, Size, detect_as_tensors
from .operators import load_onnx
from .samples import resized_and_rolled, synthetic_image

__all__ = [
    "CheckRow",
    "check_sizes",
    "compare_with_eager",
    "format_table",
    "load_exported",
]

Run = Callable[[Tensor], Sequence[Tensor]]


class CheckRow(NamedTuple):
    """One image, or batch, of a check: largest differences from the model.

    Attributes:
        size: (height, width) in pixels.
        num_eager, num_exported: detections, or anchors of raw heads.
        box_difference: of any coordinate, in pixels.
        score_difference: of any score, and of any mask value.
        num_ties: detections that the file chose differently among equals, see `export_matching`.
        num_unmatched: detections of either side that the other lacks, ties aside.
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
        """The same detections, boxes within 0.01 px, scores within 1e-4, ties aside."""
        return (
            self.num_unmatched == 0
            and (self.num_eager == self.num_exported or self.num_ties > 0)
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
            score_thresh = model.proposal_generator.selector.score_thresh
            rows.append(_compare_raw(size, reference(images), found, score_thresh))
        else:
            rows.append(_compare(size, model, images, found))
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


def _compare(size: Size, model: nn.Module, images: Tensor, found: Sequence[Tensor]) -> CheckRow:
    expected = detect_as_tensors(model, images)
    found_per_image = _per_image(found, len(images))
    expected_per_image = _per_image(expected, len(images))
    matches = [match_detections(*pair) for pair in zip(expected_per_image, found_per_image)]
    if any(match.num_unmatched for match in matches) and isinstance(model, ATSSDetector):
        choices = _choices(model, images)
        matches = [
            match_detections(*parts) for parts in zip(expected_per_image, found_per_image, choices)
        ]
    return CheckRow(
        size,
        len(expected[0]),
        len(found[0]),
        max(match.box_difference for match in matches),
        max(match.score_difference for match in matches),
        sum(match.num_ties for match in matches),
        sum(match.num_unmatched for match in matches),
    )


def _per_image(outputs: Sequence[Tensor], batch_size: int) -> List[List[Tensor]]:
    if batch_size == 1:
        return [list(outputs)]
    *fields, image_idxs = outputs
    return [[field[image_idxs == i] for field in fields] for i in range(batch_size)]


def _choices(model: ATSSDetector, images: Tensor) -> List[Choice]:
    core = model.proposal_generator.selector
    settings = core.nms_thresh, core.detections_per_image
    core.nms_thresh, core.detections_per_image = 1.0, -1
    try:
        candidates = _per_image(detect_as_tensors(model, images), len(images))
    finally:
        core.nms_thresh, core.detections_per_image = settings
    return [Choice(image_candidates, *settings) for image_candidates in candidates]


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
