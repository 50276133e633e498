"""What a dense detector does besides convolution: ours and Detectron2's on the same input."""

from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from atss.assigners import ATSSAssigner
from atss.box_regression import Box2BoxTransform
from atss.head import DensePredictions
from atss.layers import DeformConv2d
from atss.losses import DenseLoss
from atss.postprocessing.eager import detect
from atss.targets import label_anchors
from benchmark_peers import (
    anchor_generator,
    empty_features,
    fcos_parts,
    has_fcos,
    retinanet_parts,
    transpose,
)
from benchmark_scenes import candidate_predictions, grid_sizes_of, random_instances
from benchmark_scope import Case, Scope
from benchmark_timing import Contestant
from torch import Tensor, nn

from detectron2.layers import DeformConv, ModulatedDeformConv
from detectron2.structures import Boxes, ImageList, Instances

__all__ = ["PARTS"]


def assign_cases(scope: Scope) -> Iterator[Case]:
    """From anchors and ground truth to the class and box of every anchor."""
    for count in scope.objects:
        yield _assign_case(scope, scope.image_size, [count], 1)
    for count in [n for n in scope.objects if n in (7, 100)] or scope.objects[-1:]:
        yield _assign_case(scope, scope.image_size, [count], 9)
    yield _assign_case(scope, scope.image_size, [7, 20, 11, 15, 9, 18, 13, 10], 1)
    for factor in scope.size_factors:
        yield _assign_case(scope, scope.scaled_size(factor), [20], 1)


def _assign_case(
    scope: Scope, image_size: Tuple[int, int], counts: Sequence[int], anchors_per_location: int
) -> Case:
    generator = anchor_generator(anchors_per_location).to(scope.device)
    features = empty_features(grid_sizes_of(image_size), scope.device)
    grid, anchors = generator.grid(features), generator(features)
    num_classes = scope.num_classes
    gt_instances = [
        random_instances(count, image_size, num_classes, scope.device, i)
        for i, count in enumerate(counts)
    ]
    assigner = ATSSAssigner()
    retinanet = retinanet_parts(num_classes, anchors_per_location).to(scope.device)
    contestants = [
        Contestant("ATSS", lambda _: label_anchors(assigner, grid, gt_instances, num_classes)),
        Contestant("RetinaNet", lambda _: retinanet.label_anchors(anchors, gt_instances)),
    ]
    if has_fcos() and anchors_per_location == 1:
        fcos = fcos_parts(num_classes).to(scope.device)
        points = fcos.anchor_generator(features)
        contestants.append(Contestant("FCOS", lambda _: fcos.label_anchors(points, gt_instances)))
    objects = counts[0] if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    settings = {
        "images": len(counts),
        "size": f"{image_size[0]}x{image_size[1]}",
        "A": anchors_per_location,
        "objects": objects,
    }
    return Case("assign", settings, contestants)


def loss_cases(scope: Scope) -> Iterator[Case]:
    """From head outputs and labels to losses, and back to the gradients of the outputs."""
    for batch_size in scope.batch_sizes:
        yield _loss_case(scope, scope.image_size, batch_size, scope.num_classes)
    first = scope.batch_sizes[0]
    for num_classes in scope.class_sweep:
        yield _loss_case(scope, scope.image_size, first, num_classes)
    for factor in scope.size_factors:
        yield _loss_case(scope, scope.scaled_size(factor), first, scope.num_classes)


def _loss_case(
    scope: Scope, image_size: Tuple[int, int], batch_size: int, num_classes: int
) -> Case:
    device = scope.device
    grid_sizes = grid_sizes_of(image_size)
    generator = torch.Generator().manual_seed(batch_size)

    def outputs(channels: int, mean: float, deviation: float) -> List[Tensor]:
        levels = [torch.randn(batch_size, channels, *s, generator=generator) for s in grid_sizes]
        return [(x * deviation + mean).to(device).requires_grad_() for x in levels]

    logits = outputs(num_classes, -4.6, 1.0)
    centerness = outputs(1, 0.0, 1.0)
    deltas = outputs(4, 0.0, 0.3)
    features = empty_features(grid_sizes, device)
    ours = anchor_generator().to(device)
    grid, anchors = ours.grid(features), ours(features)
    gt_instances = [
        random_instances(7 + 13 * i // batch_size, image_size, num_classes, device, i)
        for i in range(batch_size)
    ]
    targets = label_anchors(ATSSAssigner(), grid, gt_instances, num_classes)
    loss = DenseLoss(Box2BoxTransform((10.0, 10.0, 5.0, 5.0)), num_classes)

    def atss(_: Any) -> Dict[str, Tensor]:
        losses = loss(DensePredictions(logits, deltas, centerness), grid, targets)
        torch.autograd.grad(sum(losses.values()), [*logits, *deltas, *centerness])
        return losses

    retinanet = retinanet_parts(num_classes).to(device)
    labels, boxes = retinanet.label_anchors(anchors, gt_instances)

    def retinanet_losses(_: Any) -> Dict[str, Tensor]:
        pred_logits, pred_deltas = transpose(logits, num_classes), transpose(deltas, 4)
        losses = retinanet.losses(anchors, pred_logits, labels, pred_deltas, boxes)
        torch.autograd.grad(sum(losses.values()), [*logits, *deltas])
        return losses

    contestants = [Contestant("ATSS", atss), Contestant("RetinaNet", retinanet_losses)]
    if has_fcos():
        fcos = fcos_parts(num_classes).to(device)
        points = fcos.anchor_generator(features)
        point_labels, point_boxes = fcos.label_anchors(points, gt_instances)
        distances = outputs(4, 4.0, 0.3)

        def fcos_losses(_: Any) -> Dict[str, Tensor]:
            losses = fcos.losses(
                points,
                transpose(logits, num_classes),
                point_labels,
                transpose(distances, 4),
                point_boxes,
                transpose(centerness, 1),
            )
            torch.autograd.grad(sum(losses.values()), [*logits, *distances, *centerness])
            return losses

        contestants.append(Contestant("FCOS", fcos_losses))
    settings = {
        "images": batch_size,
        "size": f"{image_size[0]}x{image_size[1]}",
        "classes": num_classes,
    }
    logit_bytes = sum(x.numel() * x.element_size() for x in logits)
    return Case("loss", settings, contestants, unit_bytes=logit_bytes)


def post_cases(scope: Scope) -> Iterator[Case]:
    """From head outputs to detections."""
    for batch_size in sorted({1, *scope.batch_sizes} - {2}):
        yield _post_case(scope, scope.image_size, batch_size)


def _post_case(scope: Scope, image_size: Tuple[int, int], batch_size: int) -> Case:
    device, num_classes = scope.device, scope.num_classes
    made = candidate_predictions(image_size, batch_size, num_classes)
    grid_sizes = grid_sizes_of(image_size)
    features = empty_features(grid_sizes, device)
    image_sizes = [image_size] * batch_size

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

    logits, centerness = per_level(made.class_logits), per_level(made.centerness)

    def copies(*outputs: List[Tensor]):
        # Detectron2's FCOS writes into its predictions, so each call gets its own.
        return lambda: [[level.clone() for level in levels] for levels in outputs]

    anchors = anchor_generator().to(device)(features)
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    deltas = encode(transform, anchors)

    @torch.no_grad()
    def atss(predictions: List[List[Tensor]]) -> List[Instances]:
        return detect(DensePredictions(*predictions), anchors, image_sizes, transform.apply_deltas)

    contestants = [Contestant("ATSS", atss, copies(logits, deltas, centerness))]
    if has_fcos():
        fcos = fcos_parts(num_classes).to(device)
        fcos_deltas = encode(fcos.box2box_transform, fcos.anchor_generator(features))
        images = ImageList(torch.empty(0), image_sizes)

        @torch.no_grad()
        def fcos_inference(predictions: List[List[Tensor]]) -> List[Instances]:
            return fcos.forward_inference(images, features, predictions)

        contestants.append(
            Contestant("FCOS", fcos_inference, copies(logits, fcos_deltas, centerness))
        )
    retinanet = retinanet_parts(num_classes).to(device)
    retinanet.test_nms_thresh = 0.6

    @torch.no_grad()
    def retinanet_inference(predictions: List[List[Tensor]]) -> List[Instances]:
        if hasattr(retinanet, "forward_inference"):
            images = ImageList(torch.empty(0), image_sizes)
            return retinanet.forward_inference(images, features, predictions)
        # Detectron2 up to 0.6
        pred_logits = transpose(predictions[0], num_classes)
        pred_deltas = transpose(predictions[1], 4)
        return retinanet.inference(anchors, pred_logits, pred_deltas, image_sizes)

    contestants.append(Contestant("RetinaNet", retinanet_inference, copies(logits, deltas)))
    settings = {
        "images": batch_size,
        "size": f"{image_size[0]}x{image_size[1]}",
        "classes": num_classes,
        "candidates": round(made.num_candidates),
    }
    return Case("post", settings, contestants)


def deform_conv_cases(scope: Scope) -> Iterator[Case]:
    """Deformable convolution of a P5-sized map, 256 channels, with and without a mask."""
    height, width = grid_sizes_of(scope.image_size)[2]
    for modulated in (False, True):
        for backward in (False, True):
            yield _deform_conv_case(scope.device, (height, width), modulated, backward)


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
    peer = (ModulatedDeformConv if modulated else DeformConv)(
        channels, channels, 3, padding=1, **({"bias": False} if modulated else {})
    )
    theirs = contestant("Detectron2", peer, inputs)
    try:
        theirs.call(None)
        contestants.append(theirs)
    except (NotImplementedError, ImportError, RuntimeError, NameError, AttributeError) as error:
        print(f"deform_conv: Detectron2's {type(peer).__name__} does not run here: {error}")
    plain = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    contestants.append(contestant("plain convolution", plain, inputs[:1]))
    settings = {
        "operator": "DCNv2" if modulated else "DCNv1",
        "direction": "forward + backward" if backward else "forward",
        "input": f"1x{channels}x{size[0]}x{size[1]}",
    }
    return Case("deform_conv", settings, contestants)


PARTS = {
    "assign": assign_cases,
    "loss": loss_cases,
    "post": post_cases,
    "deform_conv": deform_conv_cases,
}
