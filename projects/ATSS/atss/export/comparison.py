"""Comparison of an exported file with its model, and images to compare them on."""

import os
import tempfile
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.evaluation import inference_context

from ..detector import ATSSDetector
from ..postprocessing import SelectionInputs
from .formats import FORMATS, RunFile
from .matching import Difference, Suppression, match_detections
from .modules import STAGES, ImageSize, detect_as_tensors, join_images, raw_heads_as_tensors

FEATURE_TOLERANCE = 1e-4  # of the largest value of a map
LEAST_ANCHORS = 100  # whose boxes are compared in raw heads, however low their scores


class ComparisonRow(NamedTuple):
    """One image, or batch, of a comparison.

    Attributes:
        size: (height, width) in pixels.
        num_eager, num_exported: detections or candidates, anchors of raw heads, feature maps.
        difference: between the two.
    """

    size: ImageSize
    num_eager: int
    num_exported: int
    difference: Difference

    @property
    def passed(self) -> bool:
        return self.difference.is_rounding


def sizes_to_compare(example_size: ImageSize) -> List[ImageSize]:
    """Four (height, width): odd and not divisible by 32, small, portrait, larger than traced."""
    height, width = example_size
    return [(237, 331), (97, 120), (310, 200), (height + height // 2 + 7, width + width // 2 + 3)]


@torch.no_grad()
def compare_with_eager(
    model: nn.Module,
    run: RunFile,
    sizes: Sequence[ImageSize],
    batch_size: int = 1,
    stage: str = "detections",
    image: Optional[Tensor] = None,
) -> List[ComparisonRow]:
    """Run an exported file and its model on the same images.

    Args:
        model: on the CPU.
        run: see `Format.load`.
        sizes: (height, width) of each batch.
        batch_size: N of the file.
        stage: where the file ends, see `ExportableDetector`.
        image: (3, H, W) in 0..255, brought to each size; synthetic images by default.

    Returns:
        One row per size.
    """
    rows = []
    with inference_context(model):
        for i, size in enumerate(sizes):
            images = _batch_to_compare(size, batch_size, i, image)
            expected, found = _eager_outputs(model, images, stage), list(run(images))
            if stage == "features":
                difference = _compare_features(expected, found)
                counts = len(expected), len(found)
            elif stage == "raw heads":
                score_thresh = model.proposal_generator.selector.score_thresh
                difference = _compare_raw_heads(expected, found, score_thresh)
                counts = expected[0].shape[1], found[0].shape[1]
            else:
                difference = _compare_boxes(model, images, stage, expected, found)
                counts = len(expected[0]), len(found[0])
            rows.append(ComparisonRow(size, *counts, difference))
    return rows


def first_stage_that_differs(
    export: Callable[..., object],
    compare: Callable[..., Sequence[ComparisonRow]],
    export_format: str,
    stage: str = "detections",
) -> str:
    """The first stage whose outputs differ, for a file that failed its comparison.

    Exports the model up to each earlier stage, in the same format, and compares that file; this
    takes as long as up to three exports. What the answer means:

    * Raw heads hold decoded boxes, so a mistake in decoding counts as theirs.
    * A shorter file is another program. If a runtime goes wrong only where it optimises across
      stages, the shorter file can be right, and a later stage is named.
    * Candidates have no ties: one whose score is the threshold, but for rounding, counts as a
      difference of that stage.

    Args:
        export: `export(path, stage=stage)` writes a file, with the model and the arguments of the
            one that failed.
        compare: `compare(run, stage=stage)`, with the model and the arguments of the comparison
            that failed.
        export_format: key of `FORMATS`.
        stage: where the file that failed ends; named if all earlier stages agree.
    """
    for earlier in STAGES[: STAGES.index(stage)]:
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "stage.pt2")  # torch.export insists on this ending
            export(file, stage=earlier)
            rows = compare(FORMATS[export_format].load(file), stage=earlier)
        if not all(row.passed for row in rows):
            return earlier
    return stage


def format_table(rows: Sequence[ComparisonRow]) -> str:
    """The rows as a table for people."""
    lines = [
        f"{'height x width':>14}  {'eager':>7}  {'exported':>8}  {'boxes, px':>9}  {'scores':>8}  "
        f"{'ties':>4}"
    ]
    for (height, width), num_eager, num_exported, difference in rows:
        verdict = "ok" if difference.is_rounding else "FAILED"
        if difference.num_unmatched:
            verdict += f", {difference.num_unmatched} without a partner"
        lines.append(
            f"{f'{height} x {width}':>14}  {num_eager:>7}  {num_exported:>8}  "
            f"{difference.boxes:>9.5f}  {difference.scores:>8.1e}  {difference.num_ties:>4}  "
            f"{verdict}"
        )
    return "\n".join(lines)


def _batch_to_compare(
    size: ImageSize, batch_size: int, number: int, image: Optional[Tensor]
) -> Tensor:
    """(N, 3, H, W): synthetic, or an image with its columns moved round by 0, 1, ... eighths."""
    if image is None:
        seeds = range(number * batch_size, (number + 1) * batch_size)
        return torch.stack([synthetic_image(size, seed) for seed in seeds])
    eighth = image.shape[-1] // 8
    images = [image.float().roll(i * eighth, dims=-1) for i in range(batch_size)]
    return F.interpolate(torch.stack(images), size=size, mode="bilinear", align_corners=False)


def _eager_outputs(model: nn.Module, images: Tensor, stage: str) -> Tuple[Tensor, ...]:
    """What a file of this stage must return, by the code that the model itself runs."""
    if stage == "detections":
        return detect_as_tensors(model, images)
    core = model.proposal_generator
    batch = model.preprocess_image([{"image": image} for image in images])
    features = model.backbone(batch.tensor)
    feature_list = [features[name] for name in core.in_features]
    if stage == "features":
        return tuple(feature_list)
    predictions, anchors = core.head(feature_list), core.anchor_generator(feature_list)
    if stage == "raw heads":
        return raw_heads_as_tensors(core, predictions, [level.tensor for level in anchors])
    inputs = SelectionInputs(predictions, anchors, batch.image_sizes, core.decode)
    return join_images(core.selector.candidates(inputs))


def _compare_features(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    if [x.shape for x in expected] != [x.shape for x in found]:
        return Difference(0.0, 0.0, 0, len(expected))
    is_near = [(a - b).abs() <= FEATURE_TOLERANCE * a.abs().max() for a, b in zip(expected, found)]
    return Difference(0.0, 0.0, 0, sum(int((~values).sum()) for values in is_near))


def _compare_raw_heads(
    expected: Sequence[Tensor], found: Sequence[Tensor], score_thresh: float
) -> Difference:
    num_anchors = expected[0].shape[1]
    if [x.shape for x in expected] != [x.shape for x in found]:
        return Difference(0.0, 0.0, 0, num_anchors)
    scores = [(a.sigmoid() - b.sigmoid()).abs().max() for a, b in zip(expected[::2], found[::2])]
    # Boxes that can become detections, and the best in any case; of others, far off and huge, only
    # the least digits differ.
    best_scores = expected[0].sigmoid().amax(dim=2)  # (N, R)
    is_compared = best_scores > score_thresh / 2
    best = best_scores.topk(min(LEAST_ANCHORS, num_anchors), dim=1).indices
    is_compared = is_compared.scatter(1, best, True)
    boxes = (expected[1] - found[1]).abs().amax(dim=2)[is_compared].max()
    return Difference(float(boxes), float(torch.stack(scores).max()), 0, 0)


def _compare_boxes(
    model: nn.Module,
    images: Tensor,
    stage: str,
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
) -> Difference:
    """Candidates or detections of a batch."""
    lists = [_per_image(expected, len(images)), _per_image(found, len(images))]
    differences = [match_detections(*image_lists) for image_lists in zip(*lists)]
    may_tie = stage == "detections" and isinstance(model, ATSSDetector)
    if may_tie and any(difference.num_unmatched for difference in differences):
        selector = model.proposal_generator.selector
        candidates = _per_image(_eager_outputs(model, images, "candidates"), len(images))
        rule = selector.nms_thresh, selector.detections_per_image
        lists.append([Suppression(image_candidates, *rule) for image_candidates in candidates])
        differences = [match_detections(*parts) for parts in zip(*lists)]
    boxes, scores, num_ties, num_unmatched = zip(*differences)
    return Difference(max(boxes), max(scores), sum(num_ties), sum(num_unmatched))


def _per_image(outputs: Sequence[Tensor], batch_size: int) -> List[List[Tensor]]:
    if batch_size == 1:
        return [list(outputs)]
    *fields, image_idxs = outputs
    return [[field[image_idxs == i] for field in fields] for i in range(batch_size)]


def synthetic_image(size: ImageSize, seed: int = 0) -> Tensor:
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
def spread_scores(model: nn.Module, size: ImageSize = (256, 320), std: float = 2.0) -> None:
    """Rescale random weights so that scores spread and there are detections to compare.

    On a synthetic image and the first level, class logits then have mean -4 and the given
    deviation, centerness logits deviation 1 and deltas half their unit; class logits of a second
    stage the same deviation as the first's. Offsets of deformable convolutions, all zero at first,
    get a deviation of a pixel.

    Args:
        model: an `ATSSDetector` or a two-stage model on one, changed in place.
        size: (height, width) of the image.
        std: deviation of the class logits.
    """
    head = model.proposal_generator.head
    targets = {head.cls_logits: (std, -4.0), head.bbox_pred: (0.5, None)}
    if head.centerness is not None:
        targets[head.centerness] = (1.0, 0.0)
    for name, module in model.named_modules():
        if name.endswith(("conv2_offset", "conv_offset")):
            nn.init.normal_(module.weight)
            targets[module] = (1.0, None)
        elif name.endswith("cls_score"):
            targets[module] = (std, None)

    def rescale(layer: nn.Module, inputs: Tuple[Tensor, ...], outputs: Tensor) -> Optional[Tensor]:
        if layer not in targets:
            return None  # rescaled on an earlier level
        wanted_std, wanted_mean = targets.pop(layer)
        values = outputs.transpose(0, 1).flatten(1)  # (channels, all images and locations)
        factor = wanted_std / values.std(dim=1).clamp(min=1e-6)
        mean = layer.bias if wanted_mean is None else wanted_mean
        layer.bias.copy_(mean - (values.mean(dim=1) - layer.bias) * factor)
        layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)))
        return layer(*inputs)

    handles = [layer.register_forward_hook(rescale) for layer in targets]
    with inference_context(model):
        model([{"image": synthetic_image(size, seed=100)}])
    for handle in handles:
        handle.remove()
