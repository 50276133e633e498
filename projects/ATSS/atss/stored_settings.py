"""Settings that belong to weights, kept in the state dict so that every loader applies them.

Weights trained with anchors at another offset, or in another convention of pixels, would otherwise
give other boxes without a word.
"""

import logging
import re
from operator import attrgetter
from typing import Any, Dict, Mapping, NamedTuple

import torch
from torch import Tensor, nn

from detectron2.layers import FrozenBatchNorm2d

logger = logging.getLogger(__name__)

STATE_KEY = "_extra_state"  # PyTorch's name for what `get_extra_state` returns
_VERSION = 1
_LENGTH = 8  # version, settings, and room for more: fvcore skips a tensor of another shape
_NOT_SAID = float("nan")
_INPUT_FORMATS = ("BGR", "RGB", "L", "YUV-BT.601")
_STEM = "backbone.bottom_up.stem.conv1.weight"


class Setting(NamedTuple):
    """A setting that weights are trained with.

    Attributes:
        owner: which module of a detector has it, "" for the detector itself.
        path: its attribute there, which need not be a plain one: see `_read`, `_write`.
        yacs_key: its key in a YAML config.
        kind: type of its value.
    """

    owner: str
    path: str
    yacs_key: str
    kind: type


# By their keys in the LazyConfig of a one-stage detector. A module keeps them in this order; new
# ones are appended.
SETTINGS = {
    "model.input_format": Setting("", "input_format", "INPUT.FORMAT", str),
    "model.box_offset": Setting("proposal_generator", "box_offset", "MODEL.ATSS.BOX_OFFSET", float),
    "model.anchor_generator.offset": Setting(
        "proposal_generator", "anchor_generator.offset", "MODEL.ANCHOR_GENERATOR.OFFSET", float
    ),
    "model.selector.sqrt_score": Setting(
        "proposal_generator", "selector.sqrt_score", "MODEL.ATSS.SQRT_SCORE", bool
    ),
    "model.backbone.relu_before_p7": Setting(
        "backbone", "top_block.relu_before_p7", "MODEL.ATSS.RELU_BEFORE_P7", bool
    ),
    "model.backbone.frozen_bn_eps": Setting(
        "backbone", "frozen_bn_eps", "MODEL.ATSS.FROZEN_BN_EPS", float
    ),
    "model.backbone.stride_in_1x1": Setting(
        "backbone", "stride_in_1x1", "MODEL.RESNETS.STRIDE_IN_1X1", bool
    ),
}


class StoresSettings:
    """Module whose settings are a tensor of its state dict: what `SETTINGS` lists for its owner.

    Loading weights sets them; weights without the tensor (of version 0.1, or another code base)
    leave them as the config has them. It is computed from the attributes whenever it is asked for,
    so it is no buffer, and never trained, cast or out of date.
    """

    settings_owner: str

    def get_extra_state(self) -> Tensor:
        """(8,) float64: a version, then the settings."""
        return pack_settings(self.settings_owner, _read_all(self.settings_owner, self))

    def set_extra_state(self, state: Tensor) -> None:
        values = unpack_settings(self.settings_owner, state)
        for key in _read_all(self.settings_owner, self):
            if key in values:
                _write(self, key, values[key])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, *others):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *others)
        if prefix + STATE_KEY not in missing:
            return
        missing.remove(prefix + STATE_KEY)
        has_head = any(name.startswith(f"{prefix}head.") for name in state_dict)
        if self.settings_owner == "proposal_generator" and has_head:
            keys = ", ".join(key for key, setting in SETTINGS.items() if setting.owner)
            logger.warning(
                "These weights do not keep the geometry they were trained with (version 0.1, or "
                "another tool): that of the config holds (%s).",
                keys,
            )


def pack_settings(owner: str, values: Mapping[str, Any]) -> Tensor:
    """Settings of a module as the tensor of its state dict.

    Args:
        owner: see `Setting`.
        values: by the keys of `SETTINGS`; those of other owners are left out.

    Returns:
        (8,) float64: the version, then the settings in the order of `SETTINGS`, NaN for those that
        `values` does not have, then zeros.
    """
    numbers = [float(_VERSION)]
    for key, setting in SETTINGS.items():
        if setting.owner == owner:
            value = values.get(key, _NOT_SAID)
            if isinstance(value, str):
                value = _INPUT_FORMATS.index(value) if value in _INPUT_FORMATS else _NOT_SAID
            numbers.append(float(value))
    numbers += [0.0] * (_LENGTH - len(numbers))
    return torch.tensor(numbers, dtype=torch.float64)


def unpack_settings(owner: str, state: Tensor) -> Dict[str, Any]:
    """What `pack_settings` packed: values by the keys of `SETTINGS`.

    Raises:
        ValueError: for a tensor of a newer version.
    """
    version, *numbers = state.tolist()
    if version != _VERSION:
        raise ValueError(
            f"The weights keep their geometry in version {version:g}, this atss knows version "
            f"{_VERSION}. Use the version of atss that they were saved with."
        )
    owned = [(key, setting.kind) for key, setting in SETTINGS.items() if setting.owner == owner]
    return {
        key: _INPUT_FORMATS[int(number)] if kind is str else kind(number)
        for (key, kind), number in zip(owned, numbers)
        if number == number
    }


def settings_of(model: nn.Module) -> Dict[str, Any]:
    """Settings that a detector has now, and its pixel statistics, by LazyConfig keys.

    Args:
        model: `ATSSDetector`, or a two-stage model; what its parts do not have is left out.
    """
    found = _read_all("", model)
    for owner in ("proposal_generator", "backbone"):
        found.update(_read_all(owner, getattr(model, owner, None)))
    for name in ("pixel_mean", "pixel_std"):
        if hasattr(model, name):
            found[f"model.{name}"] = getattr(model, name).flatten().tolist()
    return found


def write_setting(model: nn.Module, key: str, value: Any) -> None:
    """Change a setting of a built detector.

    Args:
        model: changed in place.
        key: of `SETTINGS`, or of the pixel statistics.
        value: new value.

    Raises:
        AttributeError: if the model has no place for it.
    """
    if key in SETTINGS:
        owner = SETTINGS[key].owner
        _write(attrgetter(owner)(model) if owner else model, key, value)
        return
    buffer = attrgetter(key[len("model.") :])(model)
    before = buffer.flatten().tolist()
    buffer.copy_(torch.tensor(value, dtype=buffer.dtype).view_as(buffer))
    _log(key, before, buffer.flatten().tolist())


def turn_channels(state_dict: Dict[str, Tensor], input_format: str, prefix: str = "") -> None:
    """Give weights the order of channels that a detector takes, which computes the same.

    Args:
        state_dict: of a detector; where it wants "RGB" and `input_format` is "BGR", or the reverse,
            first convolution, pixel statistics and format are turned in place.
        input_format: of the detector that is about to load it.
        prefix: in front of all names.

    Raises:
        ValueError: for another format, or a backbone whose first convolution is not known.
    """
    key = prefix + STATE_KEY
    wanted = input_format
    if key in state_dict:
        wanted = unpack_settings("", state_dict[key]).get("model.input_format", input_format)
    if wanted == input_format:
        return
    is_of_backbone = re.compile(rf"{re.escape(prefix)}backbone\.(?!{STATE_KEY}$)")
    has_backbone = any(is_of_backbone.match(name) for name in state_dict)
    if {wanted, input_format} != {"RGB", "BGR"} or (
        has_backbone and prefix + _STEM not in state_dict
    ):
        raise ValueError(
            f"The weights want {wanted} images, the model takes {input_format}, and their first "
            f"convolution cannot be turned. Set model.input_format (INPUT.FORMAT) to {wanted!r}."
        )
    for name, dim in ((_STEM, 1), ("pixel_mean", 0), ("pixel_std", 0)):
        if prefix + name in state_dict:
            state_dict[prefix + name] = state_dict[prefix + name].flip(dim)
    state_dict[key] = pack_settings("", {"model.input_format": input_format})
    _log("first convolution", wanted, input_format)


def _read_all(owner: str, module: Any) -> Dict[str, Any]:
    """Settings of an owner; a part of your own need not have them all."""
    found = {}
    for key, setting in SETTINGS.items():
        if setting.owner == owner:
            try:
                found[key] = _read(module, setting.path)
            except AttributeError:
                continue
    return found


def _read(owner: nn.Module, path: str) -> Any:
    if path == "frozen_bn_eps":  # or of a batch norm that trains, which may be frozen later
        norms = (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)
        return next((m.eps for m in owner.bottom_up.modules() if isinstance(m, norms)), 1e-5)
    if path == "stride_in_1x1":  # False for basic blocks, which have no 1x1
        block = owner.bottom_up.res3[0]
        return hasattr(block, "conv3") and block.conv1.stride != (1, 1)
    return attrgetter(path)(owner)


def _write(owner: nn.Module, key: str, value: Any) -> None:
    path = SETTINGS[key].path
    before = _read(owner, path)
    if before == value:
        return
    if path == "frozen_bn_eps":
        for module in owner.bottom_up.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = value
    elif path == "stride_in_1x1":
        for stage in (owner.bottom_up.res3, owner.bottom_up.res4, owner.bottom_up.res5):
            block = stage[0]
            if hasattr(block, "conv3"):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
                if hasattr(block, "conv2_offset"):
                    block.conv2_offset.stride = block.conv2.stride
    else:
        part, _, name = path.rpartition(".")
        setattr(attrgetter(part)(owner) if part else owner, name, value)
    _log(key, before, _read(owner, path))


def _log(key: str, before: Any, after: Any) -> None:
    if before != after:
        logger.info("Geometry of the weights: %s: %s -> %s", key, before, after)
