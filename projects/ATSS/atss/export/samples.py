"""On what can an untrained model be compared? Lively images, and scores that spread."""

import functools
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modules import Size

__all__ = ["resized_and_rolled", "spread_scores", "synthetic_image"]


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
    if predictions.quality is not None:
        _rescale(core.head.centerness, predictions.quality, 1.0, 0.0)
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


def resized_and_rolled(image: Tensor, size: Size, shift: int) -> Tensor:
    """An image in another size; with a shift, its columns are moved round by as many eighths."""
    image = image.float().roll(shift * (image.shape[-1] // 8), dims=-1)
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
