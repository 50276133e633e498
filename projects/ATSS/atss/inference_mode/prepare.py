"""How does a trained model detect faster? What only training needs is taken out."""

import copy
import functools
from typing import Any, Mapping, NamedTuple, Optional

import torch
from torch import nn

from ..device import compile_dense_parts, has_fast_bfloat16
from ..head import DensePredictions
from ..layers import DeformConv2d
from .folding import fold_batch_norms
from .fused_layers import fuse_convolutions

__all__ = ["inference_dtype", "prepare_as_configured", "prepare_for_inference"]

_DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def prepare_for_inference(
    model: nn.Module,
    channels_last: bool = True,
    dtype: Optional[torch.dtype] = None,
    compile: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """A model that detects the same, faster, and can no longer train.

    Fixed batch norms are folded into the convolutions before them, features are laid out with
    channels last, ReLUs of the head work in place, and on a CPU convolutions run on oneDNN's fused
    operators. In float32 only rounding differs from before. docs/performance.md says what each step
    gives.

    Args:
        model: an `ATSSDetector`, or a two-stage model with ATSS as its proposal generator; weights
            loaded, on its device. It stays as it is, unless `inplace`.
        channels_last: lay features out with channels last.
        dtype: compute backbone and dense head in `torch.bfloat16` or, on a GPU, `torch.float16`.
            What they return is float32 again, and so is what follows: boxes, scores, ROI heads.
            None is float32.
        compile: run backbone and head through `torch.compile` for images of any size. The first
            images then take a minute or more, and a CPU needs a C++ compiler. It takes the place of
            the fused operators.
        inplace: change the model itself; a copy needs the memory of its weights a second time.

    Returns:
        The prepared model in evaluation mode; `train()` raises a `RuntimeError`. Its parameters are
        not those of the model any more: load checkpoints before, not after.

    Raises:
        ValueError: for a model that is not ATSS, or is prepared already, or a type that the device
            does not compute in.
    """
    parts = _parts(model)
    if "is_prepared_for_inference" in model.__dict__:
        raise ValueError("This model is prepared for inference already; prepare a trained one.")
    dtype = None if dtype == torch.float32 else dtype
    device = next(model.parameters()).device
    _check_dtype(dtype, device)
    if not inplace:
        model = copy.deepcopy(model)
        parts = _parts(model)
    model.eval().requires_grad_(False)
    fold_batch_norms(model)
    _work_in_place(parts.head)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if dtype is not None:
        _compute_in(parts, dtype)
    if compile:
        compile_dense_parts(model, dynamic=True)
    elif device.type == "cpu":
        fuse_convolutions(model)
    model.is_prepared_for_inference = True
    model.train = functools.partial(_refuse_training, model)
    return model


def prepare_as_configured(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """`prepare_for_inference`, in place, if and as a config says.

    Args:
        model: with its weights, on its device.
        settings: "enabled", "channels_last", "precision" (see `inference_dtype`) and "compile":
            `train.prepare` of a LazyConfig, TEST.PREPARE of a YAML config with lower-case keys.

    Returns:
        The model, prepared or untouched.

    Raises:
        ValueError: see `prepare_for_inference`, `inference_dtype`.
    """
    if not settings["enabled"]:
        return model
    dtype = inference_dtype(settings["precision"], next(model.parameters()).device)
    return prepare_for_inference(
        model, settings["channels_last"], dtype, settings["compile"], inplace=True
    )


def inference_dtype(precision: str, device: torch.device) -> Optional[torch.dtype]:
    """Type of a config's word.

    Args:
        precision: "float32", "bfloat16", "float16", or "auto": bfloat16 where the device computes
            in it natively, else float32.
        device: of the model.

    Returns:
        The type, None for float32.

    Raises:
        ValueError: for an unknown word.
    """
    if precision == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else None
    if precision not in _DTYPES:
        raise ValueError(
            f"Unknown precision {precision!r} for inference; known are {['auto', *_DTYPES]} "
            "(train.prepare.precision, TEST.PREPARE.PRECISION)."
        )
    return _DTYPES[precision]


class _Parts(NamedTuple):
    backbone: nn.Module
    head: nn.Module
    roi_heads: Optional[nn.Module]


def _parts(model: nn.Module) -> _Parts:
    backbone = getattr(model, "backbone", None)
    head = getattr(getattr(model, "proposal_generator", None), "head", None)
    if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module):
        raise ValueError(
            "prepare_for_inference takes an ATSSDetector or a two-stage model with ATSS as "
            "proposal generator (a backbone and a proposal_generator.head), got "
            f"{type(model).__name__}. Unwrap data-parallel models (model.module)."
        )
    return _Parts(backbone, head, getattr(model, "roi_heads", None))


def _check_dtype(dtype: Optional[torch.dtype], device: torch.device) -> None:
    if dtype not in _DTYPES.values():
        raise ValueError(
            "prepare_for_inference takes dtype None (float32), torch.bfloat16 or torch.float16, "
            f"got {dtype}."
        )
    if dtype == torch.float16 and device.type != "cuda":
        raise ValueError(
            f"Inference in float16 needs a GPU, the model is on {device.type!r}. Take bfloat16 "
            "(train.prepare.precision, TEST.PREPARE.PRECISION)."
        )


def _work_in_place(head: nn.Module) -> None:
    """Let ReLUs overwrite their input where it is the result of a layer before, in a sequence."""
    for sequence in head.modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        is_fresh = False
        for module in sequence:
            if isinstance(module, nn.ReLU) and is_fresh:
                module.inplace = True
            is_fresh = is_fresh or isinstance(module, (nn.Conv2d, DeformConv2d))


def _compute_in(parts: _Parts, dtype: torch.dtype) -> None:
    """Backbone and head in another type, float32 before and behind them."""
    parts.backbone.to(dtype)
    parts.head.to(dtype)
    parts.backbone.register_forward_pre_hook(_CastImages(dtype))
    parts.head.register_forward_hook(_predictions_to_float32)
    if parts.roi_heads is not None:
        parts.roi_heads.register_forward_pre_hook(_features_to_float32)


class _CastImages:
    # A class and not a closure, so that prepared models can be copied and pickled.
    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any) -> Any:
        return (inputs[0].to(self.dtype), *inputs[1:])


def _predictions_to_float32(module: nn.Module, inputs: Any, outputs: Any) -> DensePredictions:
    return DensePredictions(
        *(None if levels is None else [level.float() for level in levels] for levels in outputs)
    )


def _features_to_float32(module: nn.Module, inputs: Any) -> Any:
    images, features, *others = inputs
    return (images, {name: feature.float() for name, feature in features.items()}, *others)


def _refuse_training(model: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise RuntimeError(
            "This model is prepared for inference: its norms are folded and it cannot train. Train "
            "the model that prepare_for_inference was given."
        )
    return type(model).train(model, mode)
