"""Geometry of converted weights: put into a config, or into a model that is already built."""

from operator import attrgetter
from typing import Any, Dict, List, Mapping, Tuple

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from detectron2.layers import FrozenBatchNorm2d

OVERRIDES_KEY = "atss_overrides"  # of a checkpoint that remembers them

_STEM = "backbone.bottom_up.stem.conv1.weight"

_YACS_KEYS = {
    "model.input_format": "INPUT.FORMAT",
    "model.pixel_mean": "MODEL.PIXEL_MEAN",
    "model.pixel_std": "MODEL.PIXEL_STD",
    "model.box_offset": "MODEL.ATSS.BOX_OFFSET",
    "model.selector.sqrt_score": "MODEL.ATSS.SQRT_SCORE",
    "model.anchor_generator.offset": "MODEL.ANCHOR_GENERATOR.OFFSET",
    "model.backbone.relu_before_p7": "MODEL.ATSS.RELU_BEFORE_P7",
    "model.backbone.frozen_bn_eps": "MODEL.ATSS.FROZEN_BN_EPS",
    "model.backbone.stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
}
# Keys in checkpoints of version 0.1 that have moved since.
_KEYS_OF_0_1 = {"model.sqrt_score": "model.selector.sqrt_score"}
# Where a built model keeps the entries that are plain attributes.
_ATTRIBUTES = {
    "model.box_offset": "proposal_generator.box_offset",
    "model.selector.sqrt_score": "proposal_generator.selector.sqrt_score",
    "model.anchor_generator.offset": "proposal_generator.anchor_generator.offset",
    "model.backbone.relu_before_p7": "backbone.top_block.relu_before_p7",
}


def yacs_overrides(overrides: Mapping[str, Any]) -> Dict[str, Any]:
    """The same overrides by the keys of a YAML config.

    Example:
        >>> yacs_overrides({"model.box_offset": 0.5})
        {'MODEL.ATSS.BOX_OFFSET': 0.5}
    """
    return {_YACS_KEYS[key]: value for key, value in overrides.items()}


def override_config(cfg, overrides: Mapping[str, Any]):
    """Put the geometry of weights into a config, before its model is built.

    Args:
        cfg: a LazyConfig of a one-stage detector, or a yacs config; changed in place. In a
            LazyConfig the data's image format usually follows the model's.
        overrides: of `Converted`.

    Returns:
        `cfg`.
    """
    if hasattr(cfg, "merge_from_list"):
        cfg.merge_from_list([part for item in yacs_overrides(overrides).items() for part in item])
    else:
        for key, value in overrides.items():
            OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def override_model(
    model: nn.Module, overrides: Mapping[str, Any], state_dict: Dict[str, Tensor]
) -> Tuple[Dict[str, Any], List[str]]:
    """Give a built model the geometry of the weights it is about to load.

    Where the weights want another order of channels than the data pipeline delivers, the first
    convolution and the pixel statistics are turned around, which computes the same.

    Args:
        model: detector; changed in place.
        overrides: of `Converted`.
        state_dict: the weights, in our names; changed in place where channels are turned.

    Returns:
        The overrides as they hold for the model and the (perhaps turned) weights, and what changed
        in the model, in words.

    Raises:
        ValueError: naming the first override that the model has no place for.
    """
    overrides = {_KEYS_OF_0_1.get(key, key): value for key, value in overrides.items()}
    input_format = overrides.get("model.input_format")
    model_format = getattr(model, "input_format", input_format)
    changes = []
    if input_format != model_format:
        if {input_format, model_format} != {"RGB", "BGR"}:
            raise _conflict("model.input_format", input_format, f"it takes {model_format!r}")
        if _STEM in state_dict:
            state_dict[_STEM] = state_dict[_STEM].flip(1)
        for key in ("model.pixel_mean", "model.pixel_std"):
            overrides[key] = list(reversed(overrides[key]))
        overrides["model.input_format"] = model_format
        changes.append(f"first convolution turned from {input_format} to {model_format}")
    for key, value in overrides.items():
        try:
            before = _set(model, key, value)
        except AttributeError as error:
            raise _conflict(key, value, str(error)) from error
        if before != value:
            changes.append(f"{key}: {before} -> {value}")
    return overrides, changes


def _conflict(key: str, value: Any, reason: str) -> ValueError:
    return ValueError(
        f"The weights need {key}={value}, which this model cannot take ({reason}). Load them into "
        "an ATSSDetector with Detectron2's ResNet-FPN names, or convert them with "
        "tools/convert_checkpoint.py and load only what fits."
    )


def _set(model: nn.Module, key: str, value: Any) -> Any:
    """Set an entry in a built model; the value before, `value` itself if nothing changed."""
    before = value
    if key in _ATTRIBUTES:
        path, _, name = _ATTRIBUTES[key].rpartition(".")
        owner = attrgetter(path)(model)
        before = getattr(owner, name)
        setattr(owner, name, value)
    elif key in ("model.pixel_mean", "model.pixel_std"):
        buffer = attrgetter(key[len("model.") :])(model)
        new = torch.tensor(value, dtype=buffer.dtype, device=buffer.device).view_as(buffer)
        before = value if torch.equal(buffer, new) else buffer.flatten().tolist()
        buffer.copy_(new)
    elif key == "model.backbone.frozen_bn_eps":
        for module in model.backbone.modules():
            if isinstance(module, FrozenBatchNorm2d):
                before, module.eps = module.eps, value
    elif key == "model.backbone.stride_in_1x1":
        before = _set_stride_in_1x1(model.backbone.bottom_up, value)
    return before


def _set_stride_in_1x1(bottom_up: nn.Module, value: bool) -> bool:
    before = value
    for stage in (bottom_up.res3, bottom_up.res4, bottom_up.res5):
        block = stage[0]
        if not hasattr(block, "conv3"):
            continue  # basic blocks have no 1x1
        on_1x1, on_3x3 = block.conv1.stride, block.conv2.stride
        before = on_1x1 != (1, 1)
        if before == value:
            continue
        block.conv1.stride, block.conv2.stride = on_3x3, on_1x1
        if hasattr(block, "conv2_offset"):
            block.conv2_offset.stride = on_1x1
    return before
