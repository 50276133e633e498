"""Cases of what a dense detector does besides convolution, ours and Detectron2's on equal input."""

from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from _reference_models import fcos, has_fcos, retinanet, without_network
from atss.layers import DeformConv2d
from torch import Tensor, nn

from detectron2.layers import DeformConv, ModulatedDeformConv
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances

from .atss_parts import ATSSParts, full_method
from .cases import Case, Contestant, Options, size_text
from .synthetic import candidate_predictions, grid_sizes_of, random_instances


def assign_cases(options: Options) -> Iterator[Case]:
    """From anchors and ground truth to the class and box of every anchor."""
    for count in options.objects:
        yield _assign_case(options, options.image_size, [count])
    for count in [n for n in options.objects if n in (7, 100)] or options.objects[-1:]:
        yield _assign_case(options, options.image_size, [count], 9)
    yield _assign_case(options, options.image_size, [7, 20, 11, 15, 9, 18, 13, 10])
    for factor in options.size_factors:
        yield _assign_case(options, options.scaled_size(factor), [20])


def _assign_case(
    options: Options,
    image_size: Tuple[int, int],
    counts: Sequence[int],
    anchors_per_location: int = 1,
) -> Case:
    model = full_method(options.num_classes, anchors_per_location)
    ours = ATSSParts(model, grid_sizes_of(image_size), options.device)
    gt_instances = [
        random_instances(count, image_size, options.num_classes, options.device, i)
        for i, count in enumerate(counts)
    ]
    theirs = _retinanet(model, options.device)
    contestants = [
        Contestant("ATSS", lambda _: ours.label_anchors(gt_instances)),
        Contestant("RetinaNet", lambda _: theirs.label_anchors(ours.anchors, gt_instances)),
    ]
    if has_fcos() and anchors_per_location == 1:
        other = _fcos(model, options.device)
        points = other.anchor_generator(ours.features)
        contestants.append(Contestant("FCOS", lambda _: other.label_anchors(points, gt_instances)))
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
    for num_classes in options.other_num_classes:
        yield _loss_case(options, options.image_size, first, num_classes)
    for factor in options.size_factors:
        yield _loss_case(options, options.scaled_size(factor), first, options.num_classes)


def _loss_case(
    options: Options, image_size: Tuple[int, int], batch_size: int, num_classes: int
) -> Case:
    device = options.device
    grid_sizes = grid_sizes_of(image_size)
    generator = torch.Generator().manual_seed(batch_size)

    def outputs(channels: int, mean: float, deviation: float) -> List[Tensor]:
        levels = [torch.randn(batch_size, channels, *s, generator=generator) for s in grid_sizes]
        return [(x * deviation + mean).to(device).requires_grad_() for x in levels]

    def contestant(
        name: str, losses: Callable[[], Dict[str, Tensor]], inputs: List[Tensor]
    ) -> Contestant:
        def call(_: Any) -> Dict[str, Tensor]:
            found = losses()
            torch.autograd.grad(sum(found.values()), inputs)
            return found

        return Contestant(name, call)

    logits = outputs(num_classes, -4.6, 1.0)
    centerness = outputs(1, 0.0, 1.0)
    deltas = outputs(4, 0.0, 0.3)
    gt_instances = [
        random_instances(7 + 13 * i // batch_size, image_size, num_classes, device, i)
        for i in range(batch_size)
    ]
    model = full_method(num_classes)
    ours = ATSSParts(model, grid_sizes, device)
    targets = ours.label_anchors(gt_instances)

    def atss_losses() -> Dict[str, Tensor]:
        return ours.losses(logits, deltas, centerness, targets)

    theirs = _retinanet(model, device)
    labels, boxes = theirs.label_anchors(ours.anchors, gt_instances)

    def retinanet_losses() -> Dict[str, Tensor]:
        pred_logits, pred_deltas = _transpose(logits, num_classes), _transpose(deltas, 4)
        return theirs.losses(ours.anchors, pred_logits, labels, pred_deltas, boxes)

    contestants = [
        contestant("ATSS", atss_losses, [*logits, *deltas, *centerness]),
        contestant("RetinaNet", retinanet_losses, [*logits, *deltas]),
    ]
    if has_fcos():
        other = _fcos(model, device)
        points = other.anchor_generator(ours.features)
        point_labels, point_boxes = other.label_anchors(points, gt_instances)
        distances = outputs(4, 4.0, 0.3)

        def fcos_losses() -> Dict[str, Tensor]:
            return other.losses(
                points,
                _transpose(logits, num_classes),
                point_labels,
                _transpose(distances, 4),
                point_boxes,
                _transpose(centerness, 1),
            )

        contestants.append(contestant("FCOS", fcos_losses, [*logits, *distances, *centerness]))
    settings = {"images": batch_size, "size": size_text(image_size), "classes": num_classes}
    logit_bytes = sum(x.numel() * x.element_size() for x in logits)
    return Case("loss", settings, contestants, unit_bytes=logit_bytes)


def post_cases(options: Options) -> Iterator[Case]:
    """From head outputs to detections."""
    for batch_size in sorted({1, *options.batch_sizes} - {2}):
        yield _post_case(options, batch_size)


def _post_case(options: Options, batch_size: int) -> Case:
    device, num_classes, image_size = options.device, options.num_classes, options.image_size
    grid_sizes = grid_sizes_of(image_size)
    model = full_method(num_classes)
    ours = ATSSParts(model, grid_sizes, device)
    made = candidate_predictions(ours.anchors, image_size, batch_size, num_classes)
    image_sizes = [image_size] * batch_size
    images = ImageList(torch.empty(0), image_sizes)

    def per_level(values: Tensor) -> List[Tensor]:
        """(N, R, D) to head outputs (N, D, Hi, Wi)."""
        levels = values.split([height * width for height, width in grid_sizes], dim=1)
        return [
            level.transpose(1, 2).reshape(batch_size, -1, *size).contiguous().to(device)
            for level, size in zip(levels, grid_sizes)
        ]

    def encode(transform: Any, anchors: Sequence[Boxes]) -> List[Tensor]:
        boxes = torch.cat([level.tensor.cpu() for level in anchors])
        return per_level(torch.stack([transform.get_deltas(boxes, of) for of in made.boxes]))

    def contestant(name: str, call: Callable, *outputs: List[Tensor]) -> Contestant:
        # Detectron2's FCOS writes into its predictions, so each call gets its own.
        def copies() -> List[List[Tensor]]:
            return [[level.clone() for level in levels] for levels in outputs]

        return Contestant(name, torch.no_grad()(call), copies)

    logits, centerness = per_level(made.class_logits), per_level(made.centerness)
    deltas = encode(ours.transform, ours.anchors)
    contestants = [
        contestant("ATSS", lambda p: ours.detect(p, image_sizes), logits, deltas, centerness)
    ]
    if has_fcos():
        other = _fcos(model, device)
        distances = encode(other.box2box_transform, other.anchor_generator(ours.features))

        def fcos_detect(predictions: List[List[Tensor]]) -> List[Instances]:
            return other.forward_inference(images, ours.features, predictions)

        contestants.append(contestant("FCOS", fcos_detect, logits, distances, centerness))
    theirs = _retinanet(model, device)
    theirs.test_nms_thresh = 0.6

    def retinanet_detect(predictions: List[List[Tensor]]) -> List[Instances]:
        if hasattr(theirs, "forward_inference"):
            return theirs.forward_inference(images, ours.features, predictions)
        # Detectron2 up to 0.6
        pred_logits = _transpose(predictions[0], num_classes)
        pred_deltas = _transpose(predictions[1], 4)
        return theirs.inference(ours.anchors, pred_logits, pred_deltas, image_sizes)

    contestants.append(contestant("RetinaNet", retinanet_detect, logits, deltas))
    settings = {
        "images": batch_size,
        "size": size_text(image_size),
        "classes": num_classes,
        "candidates": round(made.num_candidates),
    }
    return Case("post", settings, contestants)


def deform_conv_cases(options: Options) -> Iterator[Case]:
    """Deformable convolution of a P5-sized map, 256 channels, with and without a mask."""
    size = grid_sizes_of(options.image_size)[2]
    for modulated in (False, True):
        for backward in (False, True):
            yield _deform_conv_case(options.device, size, modulated, backward)


def _deform_conv_case(
    device: torch.device, size: Tuple[int, int], modulated: bool, backward: bool
) -> Case:
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


def _retinanet(model: Any, device: torch.device) -> nn.Module:
    """RetinaNet with the anchors, deltas and box loss of ATSS, so that the work is equal."""
    config = retinanet(model)
    config.box2box_transform.weights = model.box2box_transform.weights
    changes = {"anchor_generator": model.anchor_generator, "box_reg_loss_type": "giou"}
    return without_network(config, **changes).to(device)


def _fcos(model: Any, device: torch.device) -> nn.Module:
    return without_network(fcos(model)).to(device)


def _transpose(levels: Sequence[Tensor], channels: int) -> List[Tensor]:
    """Head outputs (N, A*D, Hi, Wi) as (N, Hi*Wi*A, D), by Detectron2's own function."""
    return [permute_to_N_HWA_K(level, channels) for level in levels]


PARTS = {
    "assign": assign_cases,
    "loss": loss_cases,
    "post": post_cases,
    "deform_conv": deform_conv_cases,
}
