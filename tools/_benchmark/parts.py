"""Cases of what a dense detector does besides convolution, ours and Detectron2's on equal input."""

from typing import Any, Dict, Iterator, List, Sequence

import torch
from _reference_models import has_fcos
from atss.layers import DeformConv2d
from torch import Tensor, nn

from detectron2.layers import DeformConv, ModulatedDeformConv

from .atss_parts import ATSSParts, full_method
from .cases import Case, Contestant, Levels, Options, Size, scaled_size, size_text
from .reference_parts import FCOSParts, RetinaNetParts
from .synthetic import candidate_predictions, grid_sizes_of, random_instances


def _detectors(
    options: Options, image_size: Size, num_classes: int, anchors_per_location: int = 1
) -> Dict[str, Any]:
    """Detectors without networks by name, ours first."""
    types = {"ATSS": ATSSParts, "RetinaNet": RetinaNetParts}
    if has_fcos() and anchors_per_location == 1:
        types["FCOS"] = FCOSParts
    model = full_method(num_classes, anchors_per_location)
    return {name: of(model, image_size, options.device) for name, of in types.items()}


def _other_sizes(options: Options) -> List[Size]:
    factors = () if options.no_growth else (0.5, 1.5)
    return [scaled_size(options.image_size, factor) for factor in factors]


def assign_cases(options: Options) -> Iterator[Case]:
    """From anchors and ground truth to the class and box of every anchor."""
    for count in options.objects:
        yield _assign_case(options, options.image_size, [count])
    for count in [n for n in options.objects if n in (7, 100)] or options.objects[-1:]:
        yield _assign_case(options, options.image_size, [count], 9)
    yield _assign_case(options, options.image_size, [7, 20, 11, 15, 9, 18, 13, 10])
    for size in _other_sizes(options):
        yield _assign_case(options, size, [20])


def _assign_case(
    options: Options, image_size: Size, counts: Sequence[int], anchors_per_location: int = 1
) -> Case:
    gt_instances = [
        random_instances(count, image_size, options.num_classes, options.device, i)
        for i, count in enumerate(counts)
    ]
    detectors = _detectors(options, image_size, options.num_classes, anchors_per_location)
    contestants = [
        Contestant(name, lambda _, detector=detector: detector.label_anchors(gt_instances))
        for name, detector in detectors.items()
    ]
    settings = {
        "images": len(counts),
        "size": size_text(image_size),
        "A": anchors_per_location,
        "objects": counts[0] if len(counts) == 1 else f"{min(counts)} to {max(counts)}",
    }
    return Case("assign", settings, contestants)


def loss_cases(options: Options) -> Iterator[Case]:
    """From head outputs and labels to losses, and back to the gradients of the outputs."""
    first = options.batch_sizes[0]
    for batch_size in options.batch_sizes:
        yield _loss_case(options, options.image_size, batch_size, options.num_classes)
    for num_classes in () if options.no_growth else (1, 20, 365):
        yield _loss_case(options, options.image_size, first, num_classes)
    for size in _other_sizes(options):
        yield _loss_case(options, size, first, options.num_classes)


def _loss_case(options: Options, image_size: Size, batch_size: int, num_classes: int) -> Case:
    generator = torch.Generator().manual_seed(batch_size)

    def outputs(channels: int, mean: float, deviation: float) -> Levels:
        sizes = [(batch_size, channels, *size) for size in grid_sizes_of(image_size)]
        levels = [torch.randn(*size, generator=generator) * deviation + mean for size in sizes]
        return [level.to(options.device).requires_grad_() for level in levels]

    logits, centerness = outputs(num_classes, -4.6, 1.0), outputs(1, 0.0, 1.0)
    gt_instances = [
        random_instances(7 + 13 * i // batch_size, image_size, num_classes, options.device, i)
        for i in range(batch_size)
    ]

    def contestant(name: str, detector: Any) -> Contestant:
        deltas = outputs(4, detector.mean_delta, 0.3)
        labels = detector.label_anchors(gt_instances)
        inputs = [*logits, *deltas, *(centerness if detector.has_centerness else [])]

        def call(_: Any) -> Dict[str, Tensor]:
            losses = detector.losses(logits, deltas, centerness, labels)
            torch.autograd.grad(sum(losses.values()), inputs)
            return losses

        return Contestant(name, call)

    detectors = _detectors(options, image_size, num_classes)
    contestants = [contestant(name, detector) for name, detector in detectors.items()]
    settings = {"images": batch_size, "size": size_text(image_size), "classes": num_classes}
    logit_bytes = sum(x.numel() * x.element_size() for x in logits)
    return Case("loss", settings, contestants, unit_bytes=logit_bytes)


def post_cases(options: Options) -> Iterator[Case]:
    """From head outputs to detections."""
    for batch_size in sorted({1, *options.batch_sizes} - {2}):
        yield _post_case(options, batch_size)


def _post_case(options: Options, batch_size: int) -> Case:
    image_size, num_classes = options.image_size, options.num_classes
    grid_sizes = grid_sizes_of(image_size)
    detectors = _detectors(options, image_size, num_classes)
    squares = detectors["ATSS"].anchors
    made = candidate_predictions(squares, image_size, batch_size, num_classes)

    def per_level(values: Tensor) -> Levels:
        """(N, R, D) to head outputs (N, D, Hi, Wi)."""
        levels = values.split([height * width for height, width in grid_sizes], dim=1)
        return [
            level.transpose(1, 2).reshape(batch_size, -1, *size).contiguous().to(options.device)
            for level, size in zip(levels, grid_sizes)
        ]

    def contestant(name: str, detector: Any) -> Contestant:
        anchors = torch.cat([level.tensor.cpu() for level in detector.anchors])
        deltas = torch.stack([detector.transform.get_deltas(anchors, of) for of in made.boxes])
        outputs = [per_level(values) for values in (made.class_logits, deltas, made.centerness)]

        @torch.no_grad()
        def call(predictions: List[Levels]) -> Any:
            return detector.detect(*predictions)

        # Detectron2's FCOS writes into its predictions, so each call gets its own.
        return Contestant(name, call, lambda: [[x.clone() for x in levels] for levels in outputs])

    names = [name for name in ("ATSS", "FCOS", "RetinaNet") if name in detectors]
    settings = {
        "images": batch_size,
        "size": size_text(image_size),
        "classes": num_classes,
        "candidates": round(made.num_candidates),
    }
    return Case("post", settings, [contestant(name, detectors[name]) for name in names])


def deform_conv_cases(options: Options) -> Iterator[Case]:
    """Deformable convolution of a P5-sized map, 256 channels, with and without a mask."""
    size = grid_sizes_of(options.image_size)[2]
    for modulated in (False, True):
        for backward in (False, True):
            yield _deform_conv_case(options.device, size, modulated, backward)


def _deform_conv_case(device: torch.device, size: Size, modulated: bool, backward: bool) -> Case:
    channels = 256
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, *size, generator=generator).to(device).requires_grad_(backward)
    inputs = [x, torch.randn(1, 18, *size, generator=generator).to(device)]
    if modulated:
        inputs.append(torch.rand(1, 9, *size, generator=generator).to(device))

    def contestant(name: str, layer: nn.Module, arguments: Sequence[Tensor]) -> Contestant:
        layer = layer.to(device)

        def call(_: Any) -> Tensor:
            with torch.set_grad_enabled(backward):
                out = layer(*arguments)
                if backward:
                    torch.autograd.grad(out.sum(), [x, layer.weight])
            return out

        return Contestant(name, call)

    contestants = [contestant("ATSS", DeformConv2d(channels, channels, 3, padding=1), inputs)]
    layer_type = ModulatedDeformConv if modulated else DeformConv
    layer = layer_type(channels, channels, 3, padding=1, **({"bias": False} if modulated else {}))
    theirs = contestant("Detectron2", layer, inputs)
    try:
        theirs.call(None)
        contestants.append(theirs)
    except (NotImplementedError, ImportError, RuntimeError, NameError, AttributeError) as error:
        print(f"deform_conv: Detectron2's {layer_type.__name__} does not run here: {error}")
    plain = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    contestants.append(contestant("plain convolution", plain, inputs[:1]))
    settings = {
        "operator": "DCNv2" if modulated else "DCNv1",
        "direction": "forward + backward" if backward else "forward",
        "input": f"1x{channels}x{size_text(size)}",
    }
    return Case("deform_conv", settings, contestants)


PARTS = {
    "assign": assign_cases,
    "loss": loss_cases,
    "post": post_cases,
    "deform_conv": deform_conv_cases,
}
