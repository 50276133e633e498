"""Conversion of weights: another code base's names to ours, and back; another number of classes."""

import math
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..checks import check_choice, check_integer
from ..stored_settings import STATE_KEY
from .files import CheckpointError
from .key_maps import Source, translate
from .sources import SOURCES, overrides_of

_HEAD = "proposal_generator.head."
_OURS = "atss"
_TOWER_KERNEL = re.compile(r"proposal_generator\.head\.(?:cls|bbox)_tower\.\d+\.weight")


class Converted(NamedTuple):
    """Weights in other names.

    Attributes:
        state_dict: parameters and buffers by their new names.
        overrides: config entries that belong to the weights, by their dotted names in a LazyConfig
            ("model.box_offset"); empty on the way back.
        dropped: names that have no place on the other side, each with the reason.
    """

    state_dict: Dict[str, Tensor]
    overrides: Dict[str, Any]
    dropped: Dict[str, str]


def detect_source(checkpoint: Mapping[str, Any]) -> Optional[str]:
    """Name of the code base whose parameter names these are: "author", "mmdet", "torchvision",
    "atss" for our own, or None.

    Args:
        checkpoint: a state dict, bare or wrapped in "model" or "state_dict".
    """
    names = list(unwrap(checkpoint))
    if any(name.startswith(("proposal_generator.", "backbone.bottom_up.")) for name in names):
        return _OURS
    for source in SOURCES.values():
        if all(any(re.fullmatch(mark, name) for name in names) for mark in source.marks):
            return source.name
    return None


def convert_checkpoint(
    state_dict: Mapping[str, Any], source: str = "auto", target: str = "atss"
) -> Converted:
    """Weights of another code base in our names, or ours in theirs.

    Values are neither changed nor copied; only one-element scales change their shape.
    mmdetection's towers have no bias: they get one of zeros, which computes the same, so that every
    source fits the same model.

    Args:
        state_dict: parameters by name, bare or wrapped in "model" or "state_dict", with or without
            "module." in front of the names. Not changed.
        source: "author", "mmdet", "torchvision", "atss", or "auto" to recognise it.
        target: "atss"; or, for weights in our names, "author" or "mmdet".

    Returns:
        `Converted`.

    Raises:
        CheckpointError: a `ValueError`, if the source is not recognised, or a name is neither
            mapped nor known as dispensable: then it is another architecture.
        ValueError: for an unknown source or target.
    """
    weights = unwrap(state_dict)
    check_choice("convert_checkpoint", "source", source, ["auto", _OURS, *SOURCES])
    check_choice("convert_checkpoint", "target", target, [_OURS, "author", "mmdet"])
    found = detect_source(weights) if source == "auto" else source
    if found is None:
        titles = ", ".join(known.title for known in SOURCES.values())
        raise CheckpointError(
            f"These are not weights of an ATSS detector or a ResNet: names are such as "
            f"{sorted(weights)[:3]}; known are those of {titles}."
        )
    if found == target == _OURS:
        return Converted(weights, {}, {})
    if found == _OURS:
        return _from_ours(weights, target)
    if target != _OURS:
        raise ValueError(
            f"Weights of {found!r} become 'atss', not {target!r}; convert them in two steps."
        )
    return _to_ours(weights, found)


def num_classes_of(state_dict: Mapping[str, Tensor]) -> Optional[int]:
    """K of weights in our names; None if they have no head."""
    logits, deltas = (state_dict.get(f"{_HEAD}{name}.bias") for name in ("cls_logits", "bbox_pred"))
    if logits is None or deltas is None:
        return None
    return len(logits) // (len(deltas) // 4)


def rehead(
    state_dict: Mapping[str, Tensor], num_classes: int, prior_prob: float = 0.01
) -> Tuple[Dict[str, Tensor], List[str]]:
    """Weights for another number of classes: the class predictor is re-initialised, seeded.

    Args:
        state_dict: in our names.
        num_classes: K wanted.
        prior_prob: initial class probability.

    Returns:
        A new dict, and the names that were re-initialised (none if K is the same).

    Raises:
        ValueError: for weights without a head, or fewer than one class.
    """
    present = num_classes_of(state_dict)
    if present is None:
        raise ValueError("These weights have no ATSS head, so no classes to change.")
    check_integer("A detector", "number of classes", num_classes, 1)
    weights = dict(state_dict)
    if present == num_classes:
        return weights, []
    names = [f"{_HEAD}cls_logits.weight", f"{_HEAD}cls_logits.bias"]
    weight, bias = (weights[name] for name in names)
    num_logits = len(bias) // present * num_classes
    generator = torch.Generator().manual_seed(0)
    weights[names[0]] = torch.empty(num_logits, *weight.shape[1:], dtype=weight.dtype).normal_(
        std=0.01, generator=generator
    )
    weights[names[1]] = bias.new_full((num_logits,), -math.log((1 - prior_prob) / prior_prob))
    return weights, names


def unwrap(checkpoint: Mapping[str, Any]) -> Dict[str, Tensor]:
    """Weights alone: what is below "model" or "state_dict", without "module." in front of names.

    Raises:
        CheckpointError: for anything but tensors by name.
    """
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise CheckpointError(
            f"A checkpoint needs to be a dict of tensors by name, got {type(checkpoint).__name__}."
        )
    weights = {}
    for name, value in checkpoint.items():
        if not isinstance(value, Tensor):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"A checkpoint needs tensors, but {name!r} is a {type(value).__name__}."
                ) from error
        weights[re.sub(r"^(module\.)+", "", str(name))] = value
    return weights


def _to_ours(weights: Dict[str, Tensor], name: str) -> Converted:
    source = SOURCES[name]
    state_dict, dropped, unknown = _rename(weights, source, source.dropped, to_ours=True)
    if unknown or not state_dict:
        raise CheckpointError(
            f"These are not weights of an ATSS detector of {source.title}: it has no "
            f"{unknown[:3] or 'known names'} ({len(unknown)} unknown of {len(weights)} names)."
        )
    if name == "mmdet":
        for tower_bias, conv in _tower_biases(state_dict).items():
            state_dict.setdefault(tower_bias, conv.new_zeros(len(conv)))
    return Converted(state_dict, overrides_of(name, state_dict), dropped)


def _from_ours(weights: Dict[str, Tensor], name: str) -> Converted:
    source = SOURCES[name]
    to_drop = [*source.dropped, (rf"pixel_(mean|std)|(.*\.)?{STATE_KEY}", "is in the config")]
    if name == "mmdet":
        for tower_bias in _tower_biases(weights):
            if tower_bias in weights and weights[tower_bias].any():
                raise CheckpointError(
                    f"{tower_bias!r} is not zero, but mmdetection's tower convolutions have no "
                    "bias. Train with model.head.conv_bias=False to convert to mmdetection."
                )
            reason = "is zero; mmdetection's tower convolutions have no bias"
            to_drop.append((re.escape(tower_bias), reason))
    state_dict, dropped, unknown = _rename(weights, source, to_drop, to_ours=False)
    if unknown:
        raise CheckpointError(f"{unknown[0]!r} has no name in {source.title}.")
    return Converted(state_dict, {}, dropped)


def _rename(
    weights: Dict[str, Tensor], source: Source, to_drop: Sequence[Tuple[str, str]], to_ours: bool
) -> Tuple[Dict[str, Tensor], Dict[str, str], List[str]]:
    """Weights by their names on the other side, dropped names with reasons, and unknown names."""
    state_dict: Dict[str, Tensor] = {}
    dropped: Dict[str, str] = {}
    unknown: List[str] = []
    for name, value in weights.items():
        reason = next((why for pattern, why in to_drop if re.fullmatch(pattern, name)), None)
        found = None if reason else translate(name, source.rules, to_ours, weights)
        if reason:
            dropped[name] = reason
        elif found is None:
            unknown.append(name)
        else:
            new_name, rule = found
            state_dict[new_name] = value.reshape(rule.reshape[to_ours]) if rule.reshape else value
    return state_dict, dropped, unknown


def _tower_biases(weights: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Names of the biases of the towers' convolutions, there or not, each with its kernel."""
    return {
        f"{name[: -len('weight')]}bias": value
        for name, value in weights.items()
        if value.dim() == 4 and _TOWER_KERNEL.fullmatch(name)
    }
