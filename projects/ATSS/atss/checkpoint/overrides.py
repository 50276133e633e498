"""Geometry of converted weights, put into a config, into the weights, or into a built model."""

from typing import Any, Dict, Mapping

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from detectron2.config import CfgNode

from ..stored_settings import (
    SETTINGS,
    STATE_KEY,
    pack_settings,
    turn_channels,
    unpack_settings,
    write_setting,
)

OVERRIDES_KEY = "atss_overrides"  # of a checkpoint that remembers them

_PIXEL_KEYS = {"model.pixel_mean": "MODEL.PIXEL_MEAN", "model.pixel_std": "MODEL.PIXEL_STD"}
GEOMETRY_KEYS = (*SETTINGS, *_PIXEL_KEYS)  # of a LazyConfig
# Keys in checkpoints of version 0.1 that have moved since.
_KEYS_OF_0_1 = {"model.sqrt_score": "model.selector.sqrt_score"}


def yacs_overrides(overrides: Mapping[str, Any]) -> Dict[str, Any]:
    """The same overrides by the keys of a YAML config.

    Example:
        >>> yacs_overrides({"model.box_offset": 0.5})
        {'MODEL.ATSS.BOX_OFFSET': 0.5}
    """
    return {
        _PIXEL_KEYS[key] if key in _PIXEL_KEYS else SETTINGS[key].yacs_key: value
        for key, value in overrides.items()
    }


def override_config(cfg, overrides: Mapping[str, Any]):
    """Put the geometry of weights into a config, before its model is built.

    Args:
        cfg: a LazyConfig or a yacs config; changed in place. In a LazyConfig the data's image
            format usually follows the model's.
        overrides: of `Converted`.

    Returns:
        `cfg`.
    """
    if isinstance(cfg, CfgNode):
        is_frozen = cfg.is_frozen()
        cfg.defrost()
        cfg.merge_from_list([part for item in yacs_overrides(overrides).items() for part in item])
        if is_frozen:
            cfg.freeze()
        return cfg
    for key, value in overrides.items():
        is_of_core = key in SETTINGS and SETTINGS[key].owner == "proposal_generator"
        if is_of_core and "proposal_generator" in cfg.model:  # a two-stage detector
            key = key.replace("model.", "model.proposal_generator.", 1)
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def override_weights(weights: Dict[str, Tensor], overrides: Mapping[str, Any]) -> Dict[str, Tensor]:
    """Weights that keep their geometry: any loader of a one-stage detector applies it.

    Args:
        weights: in our names. Not changed.
        overrides: of `Converted`, or of a checkpoint of version 0.1.

    Returns:
        A new dict with the tensors of the modules that store settings, and the pixel statistics.
    """
    overrides = {_KEYS_OF_0_1.get(key, key): value for key, value in overrides.items()}
    weights = dict(weights)
    for owner in ("", "proposal_generator", "backbone"):
        if any(SETTINGS[key].owner == owner for key in overrides if key in SETTINGS):
            name = f"{owner}.{STATE_KEY}" if owner else STATE_KEY
            kept = unpack_settings(owner, weights[name]) if name in weights else {}
            weights[name] = pack_settings(owner, {**kept, **overrides})
    for key in _PIXEL_KEYS:
        if key in overrides:
            values = torch.tensor(overrides[key], dtype=torch.float32)
            weights[key[len("model.") :]] = values.view(-1, 1, 1)
    return weights


def override_model(
    model: nn.Module, overrides: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Dict[str, Tensor]:
    """Give a built model the geometry of the weights it is about to load.

    Models made of our modules would take it from the weights; this is for all, and refuses those
    that have no place for it. Where the weights want another order of channels than the data
    pipeline delivers, the first convolution and the pixel statistics are turned around, which
    computes the same.

    Args:
        model: detector; changed in place.
        overrides: of `Converted`, or of a checkpoint of version 0.1.
        weights: in our names. Not changed.

    Returns:
        The weights as they fit the model, with their geometry.

    Raises:
        ValueError: naming the first override that the model has no place for.
    """
    weights = override_weights(weights, overrides)
    if hasattr(model, "input_format"):
        turn_channels(weights, model.input_format)
    for key, value in overrides.items():
        key = _KEYS_OF_0_1.get(key, key)
        if key == "model.input_format":
            continue
        if key in _PIXEL_KEYS:
            value = weights[key[len("model.") :]].flatten().tolist()
        try:
            write_setting(model, key, value)
        except AttributeError as error:
            raise ValueError(
                f"The weights need {key}={value}, which this model cannot take ({error}). Load "
                "them into an ATSSDetector with Detectron2's ResNet-FPN names, or convert them "
                "with tools/convert_checkpoint.py and load only what fits."
            ) from error
    return weights
