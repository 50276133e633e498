"""Does an exported file say what the model says? A comparison on images of several sizes."""

import functools
import os
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .export_modules import PathLike, RawHeads, Size, detect_as_tensors, output_names
from .export_operators import load_onnx

__all__ = [
    "CheckRow",
    "check_sizes",
    "compare_with_eager",
    "format_table",
    "load_exported",
    "match_detections",
    "spread_scores",
    "synthetic_image",
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
            images = torch.stack([_shifted(image, size, shift) for shift in range(batch_size)])
        found = run(images)
        if raw_heads:
            score_thresh = model.proposal_generator.score_thresh
            rows.append(_compare_raw(size, reference(images), found, score_thresh))
        else:
            names = output_names(model, batch_size)
            rows.append(match_detections(size, detect_as_tensors(model, images), found, names))
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


def synthetic_image(size: Size, seed: int = 0) -> Tensor:
    """(3, H, W) float32 in 0..255: noise of several scales and flat rectangles, always the same."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for cell in (64, 16, 4, 1):
        noise = torch.randn(1, 3, height // cell + 2, width // cell + 2, generator=generator)
        image += F.interpolate(noise, size=size, mode="bilinear", align_corners=False)
    for _ in range(8):
        y, x, h, w = torch.rand(4, generator=generator).tolist()
        top, left = int(y * height), int(x * width)
        color = torch.randn(1, 3, 1, 1, generator=generator) * 2
        image[..., top : top + int(h * 100) + 8, left : left + int(w * 100) + 8] = color
    return (image[0] * 40 + 128).clamp(0, 255)


@torch.no_grad()
def spread_scores(model: nn.Module, size: Size = (256, 320), std: float = 2.0) -> None:
    """Make a model of random weights worth checking: scores spread instead of all being the prior.

    Scales the predictors in place, so that on a synthetic image class logits of the dense core
    have mean -4 and the given deviation, centerness logits deviation 1 and deltas a deviation of
    half their unit; class logits of a second stage get the same deviation. Offsets of deformable
    convolutions, all zero at first, get a deviation of a pixel.

    Args:
        model: an `ATSSDetector` or a two-stage model on one, changed in place.
        size: (height, width) of the image.
        std: deviation of the class logits.
    """
    was_training = model.training
    model.eval()
    core = model.proposal_generator
    inputs = [{"image": synthetic_image(size, seed=100)}]
    offset_convs = [
        m for name, m in model.named_modules() if name.endswith(("conv2_offset", "conv_offset"))
    ]
    hooks = [conv.register_forward_hook(_spread_offsets) for conv in offset_convs]
    features = model.backbone(model.preprocess_image(inputs).tensor)
    predictions = core.head([features[name] for name in core.in_features])
    for hook in hooks:
        hook.remove()
    _rescale(core.head.cls_logits, predictions.logits, std, -4.0)
    _rescale(core.head.bbox_pred, predictions.deltas, 0.5, None)
    if predictions.centerness is not None:
        _rescale(core.head.centerness, predictions.centerness, 1.0, 0.0)
    predictors = getattr(getattr(model, "roi_heads", None), "box_predictor", nn.ModuleList())
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        hook = predictor.cls_score.register_forward_hook(functools.partial(_spread_linear, std=std))
        model(inputs)
        hook.remove()
    model.train(was_training)


def _spread_offsets(conv: nn.Conv2d, inputs: Tuple[Tensor], outputs: Tensor) -> Tensor:
    """Forward hook: random weights whose output on this input has a deviation of 1."""
    nn.init.normal_(conv.weight)
    outputs = F.conv2d(inputs[0], conv.weight, None, conv.stride, conv.padding, conv.dilation)
    conv.weight.div_(outputs.std())
    return outputs / outputs.std()


def _spread_linear(layer: nn.Linear, inputs: Tuple[Tensor], outputs: Tensor, std: float) -> None:
    """Forward hook: weights whose output on this input has a given deviation."""
    layer.weight.mul_(std / outputs.std().clamp(min=1e-6))


def _rescale(
    layer: nn.Conv2d, outputs: Sequence[Tensor], std: float, mean: Optional[float]
) -> None:
    channels = [level.transpose(0, 1).flatten(1) for level in outputs]
    values = torch.cat(channels, dim=1)  # (channels, all locations)
    factor = std / values.std(dim=1).clamp(min=1e-6)
    center = values.mean(dim=1) - layer.bias
    new_mean = layer.bias if mean is None else mean
    layer.weight.mul_(factor.view(-1, 1, 1, 1))
    layer.bias.copy_(new_mean - center * factor)


def _shifted(image: Tensor, size: Size, shift: int) -> Tensor:
    """An image in another size; with a shift, its columns are moved round by as many eighths."""
    image = image.float().roll(shift * (image.shape[-1] // 8), dims=-1)
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


def match_detections(
    size: Size, expected: Sequence[Tensor], found: Sequence[Tensor], names: Sequence[str]
) -> CheckRow:
    """Find each detection of one side on the other, whatever the order of nearly equal scores.

    Args:
        size: (height, width) of the image.
        expected: tensors of the model.
        found: tensors of the file.
        names: of both, see `output_names`.
    """
    left, right = dict(zip(names, expected)), dict(zip(names, found))
    boxes, others = left["boxes"].double(), right["boxes"].double()
    if len(boxes) == 0 or len(others) == 0:
        unmatched = len(boxes) + len(others)
        return CheckRow(size, len(boxes), len(others), 0.0, 0.0, 0, unmatched)
    box_distance = (boxes[:, None] - others[None]).abs().amax(dim=2)
    score_distance = (left["scores"][:, None] - right["scores"][None]).abs().double()
    if "masks" in left:
        masks = [fields["masks"].flatten(1).float() for fields in (left, right)]
        score_distance = score_distance.maximum(torch.cdist(*masks, p=float("inf")).double())
    # In units of what is allowed; another class or image is never a partner.
    cost = (box_distance / BOX_TOLERANCE).maximum(score_distance / SCORE_TOLERANCE)
    for name in ("classes", "image_idxs"):
        if name in left:
            cost[left[name][:, None] != right[name][None]] = float("inf")
    pairs = _match(cost.numpy())
    ties = _count_ties(left["scores"], right["scores"], pairs)
    rows, columns = [list(idxs) for idxs in zip(*pairs)] if pairs else ([], [])
    return CheckRow(
        size,
        len(boxes),
        len(others),
        float(box_distance[rows, columns].max()) if pairs else 0.0,
        float(score_distance[rows, columns].max()) if pairs else 0.0,
        ties,
        len(boxes) + len(others) - 2 * len(pairs) - 2 * ties,
    )


def _match(cost: np.ndarray) -> List[Tuple[int, int]]:
    """Partners of cost at most 1, the best first, each used once."""
    pairs = []
    cost = cost.copy()
    for i in range(len(cost)):
        j = int(cost[i].argmin())
        if cost[i, j] <= 1:
            pairs.append((i, j))
            cost[:, j] = np.inf
    return pairs


def _count_ties(scores: Tensor, others: Tensor, pairs: Sequence[Tuple[int, int]]) -> int:
    """Detections without a partner on both sides whose scores are nevertheless the same."""
    rows, columns = {i for i, _ in pairs}, {j for _, j in pairs}
    left = sorted(float(s) for i, s in enumerate(scores) if i not in rows)
    right = sorted(float(s) for j, s in enumerate(others) if j not in columns)
    return sum(abs(a - b) <= TIE_TOLERANCE for a, b in zip(left, right))


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
