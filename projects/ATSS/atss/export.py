"""How does a trained detector leave Python? TorchScript, torch.export and ONNX files.

All formats hold the same computation, `ExportableDetector`: an image tensor in, tensors out, with
decoding and NMS inside. It calls the parts of the detector itself; only what a graph cannot hold
(lists of `Instances`, assertions on values, branches on the number of boxes) has another form here.
"""

import contextlib
import copy
import os
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.fx.experimental._config
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from .detector import ATSSDetector
from .head import flatten_level
from .postprocessing import Candidates, select_candidates

__all__ = [
    "CheckRow",
    "ExportableDetector",
    "RawHeads",
    "compare_with_eager",
    "export_onnx",
    "export_program",
    "export_torchscript",
    "spread_scores",
]

PathLike = Union[str, "os.PathLike[str]"]


def _normalize_and_pad(model: ATSSDetector, images: Tensor) -> Tensor:
    """`preprocess_image` for images of one size: (N, 3, H, W) to a multiple of 32 pixels."""
    images = (images - model.pixel_mean) / model.pixel_std
    divisor = max(model.backbone.size_divisibility, 1)
    height, width = images.shape[-2], images.shape[-1]
    # Written as multiple minus size, so that the padded size is known to be a multiple.
    pad_height = (height + divisor - 1) // divisor * divisor - height
    pad_width = (width + divisor - 1) // divisor * divisor - width
    return F.pad(images, [0, pad_width, 0, pad_height])


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    # `Boxes.clip` without its assertion on values, which a graph cannot hold.
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    columns = [x1.clamp(min=0, max=width), y1.clamp(min=0, max=height)]
    columns += [x2.clamp(min=0, max=width), y2.clamp(min=0, max=height)]
    return torch.stack(columns, dim=1)


def _suppress(candidates: Candidates, nms_thresh: float, max_detections: int) -> Tensor:
    """`postprocessing.suppress` without branches on the number of boxes.

    torchvision's `batched_nms` returns early without boxes and handles many boxes class by class;
    a graph would keep the branch of the example image. Here classes are always moved apart by more
    than the largest coordinate, also if there are no boxes.
    """
    boxes, scores, classes = candidates
    largest = torch.cat((boxes.reshape(-1), boxes.new_zeros(1))).max()
    offsets = classes.to(boxes.dtype) * (largest + 1)
    keep = torchvision.ops.nms(boxes + offsets.unsqueeze(1), scores, nms_thresh)
    return keep[:max_detections] if max_detections >= 0 else keep


class ExportableDetector(nn.Module):
    """Detections of images of one size as plain tensors.

    Args:
        model: the detector; left as it is.

    Raises:
        TypeError: for a model that is not an `ATSSDetector`.
    """

    def __init__(self, model: ATSSDetector):
        super().__init__()
        self.model = _check_model(model)

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Detect.

        Args:
            images: (N, 3, H, W) float32 in 0..255, channels in the order of `input_format`.

        Returns:
            boxes (D, 4) xyxy in pixels of the input, scores (D,), classes (D,) int64, by falling
            score; with N > 1 image after image, and fourth image_idxs (D,) int64.
        """
        core = self.model.proposal_generator
        features = self.model.backbone(_normalize_and_pad(self.model, images))
        feature_list = [features[name] for name in core.in_features]
        logits, deltas, centerness = core.head(feature_list)
        # Not the generator's `Boxes`: those of Detectron2 0.5 freeze the device into a trace.
        anchors = core.anchor_generator._grid_anchors(feature_list)
        num_anchors = core.anchor_generator.num_anchors[0]
        logits = [flatten_level(level, num_anchors) for level in logits]
        deltas = [flatten_level(level, num_anchors) for level in deltas]
        if centerness is not None:
            centerness = [flatten_level(level, num_anchors).squeeze(2) for level in centerness]

        results: List[Tuple[Tensor, ...]] = []
        for i in range(len(images)):
            levels = [
                select_candidates(
                    logits[j][i],
                    deltas[j][i],
                    None if centerness is None else centerness[j][i],
                    anchors[j],
                    core.box2box_transform.apply_deltas,
                    core.score_thresh,
                    core.topk_candidates,
                    core.sqrt_score,
                )
                for j in range(len(logits))
            ]
            candidates = Candidates(*(torch.cat(parts) for parts in zip(*levels)))
            boxes = _clip(candidates.boxes + core.box_offset, images.shape[-2], images.shape[-1])
            is_inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # as `detect` does
            candidates = Candidates(*(part[is_inside] for part in (boxes, *candidates[1:])))
            keep = _suppress(candidates, core.nms_thresh, core.detections_per_image)
            results.append(tuple(field[keep] for field in candidates))
        if len(results) == 1:
            return results[0]
        image_idxs = [torch.full_like(result[2], i) for i, result in enumerate(results)]
        return tuple(torch.cat(parts) for parts in zip(*results)) + (torch.cat(image_idxs),)


class RawHeads(nn.Module):
    """What the head says, without selection or NMS: shapes follow from the size of the input.

    Args:
        model: the detector; left as it is.

    Raises:
        TypeError: for a model that is not an `ATSSDetector`.
    """

    def __init__(self, model: ATSSDetector):
        super().__init__()
        self.model = _check_model(model)

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Predict for every anchor.

        Args:
            images: (N, 3, H, W) float32 in 0..255, channels in the order of `input_format`.

        Returns:
            logits (N, R, K), boxes (N, R, 4) decoded, xyxy in pixels and not clipped, and
            centerness (N, R) logits for a head that has it. R counts the anchors of all levels.
        """
        core = self.model.proposal_generator
        features = self.model.backbone(_normalize_and_pad(self.model, images))
        feature_list = [features[name] for name in core.in_features]
        logits, deltas, centerness = core.head(feature_list)
        num_anchors = core.anchor_generator.num_anchors[0]
        anchors = torch.cat(core.anchor_generator._grid_anchors(feature_list))
        logits = torch.cat([flatten_level(level, num_anchors) for level in logits], dim=1)
        deltas = torch.cat([flatten_level(level, num_anchors) for level in deltas], dim=1)
        decode = core.box2box_transform.apply_deltas
        boxes = torch.stack([decode(image_deltas, anchors) for image_deltas in deltas])
        outputs = (logits, boxes + core.box_offset)
        if centerness is not None:
            parts = [flatten_level(level, num_anchors).squeeze(2) for level in centerness]
            outputs += (torch.cat(parts, dim=1),)
        return outputs


def _check_model(model: nn.Module) -> ATSSDetector:
    if not isinstance(model, ATSSDetector):
        raise TypeError(
            f"Export of {type(model).__name__} is not possible here: it needs an ATSSDetector. "
            "Two-stage models export to TorchScript only."
        )
    return copy.deepcopy(model).eval().requires_grad_(False)


def _example(module: nn.Module, batch_size: int, size: Tuple[int, int]) -> Tensor:
    device = module.model.pixel_mean.device
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch_size, 3, *size, generator=generator) * 255).to(device)


def _prepare(model: ATSSDetector, raw_heads: bool) -> nn.Module:
    return (RawHeads if raw_heads else ExportableDetector)(model).eval()


def export_torchscript(
    model: ATSSDetector,
    path: Optional[PathLike] = None,
    batch_size: int = 1,
    example_size: Tuple[int, int] = (256, 320),
    raw_heads: bool = False,
) -> torch.jit.ScriptModule:
    """TorchScript that runs with torch and torchvision alone, on any image size and device.

    Args:
        model: the detector.
        path: file to write, or None.
        batch_size: N of the file.
        example_size: (height, width) of the traced image.
        raw_heads: export `RawHeads`.

    Returns:
        The traced module.
    """
    module = _prepare(model, raw_heads)
    images = _example(module, batch_size, example_size)
    with torch.no_grad():
        traced = torch.jit.trace(module, (images,), check_trace=False)
    if path is not None:
        traced.save(os.fspath(path))
    return traced


def export_program(
    model: ATSSDetector,
    path: Optional[PathLike] = None,
    batch_size: int = 1,
    example_size: Tuple[int, int] = (256, 320),
    raw_heads: bool = False,
) -> "torch.export.ExportedProgram":
    """A `torch.export` program with dynamic height and width.

    Args:
        model: the detector.
        path: ".pt2" file to write, or None.
        batch_size: N of the file.
        example_size: (height, width) of the example image.
        raw_heads: export `RawHeads`.

    Returns:
        The program.
    """
    module = _prepare(model, raw_heads)
    images = _example(module, batch_size, example_size)
    dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    # Else sizes of 1, such as P7 of a small image, count as another program than larger ones.
    with torch.no_grad(), _size_oblivious():
        program = torch.export.export(module, (images,), dynamic_shapes=(dynamic,), strict=False)
    if path is not None:
        torch.export.save(program, os.fspath(path))
    return program


def _size_oblivious():
    config = torch.fx.experimental._config
    if hasattr(config, "backed_size_oblivious"):
        return config.patch(backed_size_oblivious=True)
    return contextlib.nullcontext()


def export_onnx(
    model: ATSSDetector,
    path: PathLike,
    batch_size: int = 1,
    example_size: Tuple[int, int] = (256, 320),
    raw_heads: bool = False,
) -> None:
    """An ONNX file with dynamic height and width, and NMS inside.

    Args:
        model: the detector.
        path: ".onnx" file to write.
        batch_size: N of the file.
        example_size: (height, width) of the example image.
        raw_heads: export `RawHeads`.

    Raises:
        ImportError: without onnx and onnxscript.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs onnx and onnxscript ({error}). Install them with "
            "`pip install atss[export]`."
        ) from error
    program = export_program(model, None, batch_size, example_size, raw_heads)
    names = ["logits", "boxes"] if raw_heads else ["boxes", "scores", "classes"]
    if raw_heads and model.proposal_generator.head.centerness is not None:
        names.append("centerness")
    if not raw_heads and batch_size > 1:
        names.append("image_idxs")
    torch.onnx.export(
        program, (), os.fspath(path), dynamo=True, input_names=["images"], output_names=names,
        external_data=False, custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
    )  # fmt: skip


def _stable_sort():
    """`aten.sort.stable` in ONNX: TopK of everything; ties: smaller index first."""
    from onnxscript import opset18 as op

    def sort_stable(self, stable=None, dim: int = -1, descending: bool = False):
        size = op.Reshape(op.Gather(op.Shape(self), dim, axis=0), op.Constant(value_ints=[1]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    return sort_stable


@torch.no_grad()
def spread_scores(
    model: ATSSDetector, size: Tuple[int, int] = (256, 320), std: float = 2.0
) -> None:
    """Make a model of random weights worth checking: scores spread instead of all being the prior.

    Scales the predictors in place, so that on noise class logits have mean -4 and the given
    deviation, centerness logits deviation 1 and deltas a deviation of half their unit.

    Args:
        model: the detector, changed in place.
        size: (height, width) of the noise.
        std: deviation of the class logits.
    """
    core = model.proposal_generator
    images = _normalize_and_pad(model, torch.rand(1, 3, *size, device=model.device) * 255)
    features = model.backbone(images)
    predictions = core.head([features[name] for name in core.in_features])
    targets = [(core.head.cls_logits, predictions.logits, std, -4.0)]
    targets.append((core.head.bbox_pred, predictions.deltas, 0.5, None))
    if predictions.centerness is not None:
        targets.append((core.head.centerness, predictions.centerness, 1.0, 0.0))
    for layer, outputs, wanted, mean in targets:
        channels = [level.transpose(0, 1).flatten(1) for level in outputs]
        values = torch.cat(channels, dim=1)  # (channels, all locations)
        factor = wanted / values.std(dim=1).clamp(min=1e-6)
        center = values.mean(dim=1) - layer.bias
        new_mean = layer.bias if mean is None else mean
        layer.weight.mul_(factor.view(-1, 1, 1, 1))
        layer.bias.copy_(new_mean - center * factor)


class CheckRow(NamedTuple):
    """One image of a check: sizes, counts, and largest differences from eager."""

    size: Tuple[int, int]
    num_eager: int
    num_exported: int
    box_difference: float
    score_difference: float
    classes_agree: bool

    @property
    def passed(self) -> bool:
        """Same number and classes, boxes within 0.01 px, scores within 1e-4."""
        return (
            self.num_eager == self.num_exported
            and self.classes_agree
            and self.box_difference <= 0.01
            and self.score_difference <= 1e-4
        )


@torch.no_grad()
def compare_with_eager(
    model: ATSSDetector, run, sizes: Sequence[Tuple[int, int]]
) -> List[CheckRow]:
    """Run an exported detector beside the eager one.

    Args:
        model: the detector.
        run: callable images (1, 3, H, W) -> (boxes, scores, classes) tensors.
        sizes: (height, width) of each noise image to try.

    Returns:
        One row per size.
    """
    was_training, rows = model.training, []
    model.eval()
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        image = torch.rand(3, *size, generator=generator) * 255
        expected = model([{"image": image}])[0]["instances"].to("cpu")
        boxes, scores, classes = run(image[None])
        same = len(expected) == len(boxes)
        differences = [float("inf")] * 2
        if same:
            pairs = ((boxes, expected.pred_boxes.tensor), (scores, expected.scores))
            differences = [float((a - b).abs().max()) if same and len(a) else 0.0 for a, b in pairs]
        agree = same and bool((classes == expected.pred_classes).all())
        rows.append(CheckRow(size, len(expected), len(boxes), *differences, agree))
    model.train(was_training)
    return rows
