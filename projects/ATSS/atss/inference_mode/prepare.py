"""Preparation of a trained model for inference: what only training needs is removed."""

import copy
import functools
from typing import Any, Mapping, Optional

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..device import compile_dense_parts, has_fast_bfloat16, to_channels_last
from ..predictions import DensePredictions
from .batch_norms import fold_batch_norms
from .onednn import use_onednn

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
    channels last, and on a CPU convolutions run on oneDNN's own operators. In float32 only rounding
    differs from before. docs/performance.md says what each step gives.

    Args:
        model: an `ATSSDetector`, or a two-stage model with ATSS as its proposal generator; weights
            loaded, on its device. It stays as it is, unless `inplace`.
        channels_last: lay features out with channels last.
        dtype: compute backbone and dense head in `torch.bfloat16` or, on a GPU, `torch.float16`.
            What they return is float32 again, and so is what follows: boxes, scores, ROI heads.
            None is float32.
        compile: run backbone and head through `torch.compile` for images of any size, in place of
            oneDNN's operators. The first images then take a minute or more, and a CPU needs a C++
            compiler.
        inplace: change the model itself; a copy needs the memory of its weights a second time.

    Returns:
        The prepared model in evaluation mode; `train()` raises a `RuntimeError`. Its parameters are
        no longer those of the model: load checkpoints before, not after.

    Raises:
        ValueError: for a model that is not ATSS, or is prepared already, or a type that the device
            does not compute in.
    """
    _check_model(model)
    dtype = None if dtype == torch.float32 else dtype
    device = next(model.parameters()).device
    _check_dtype(dtype, device)
    if not inplace:
        model = copy.deepcopy(model)
    model.eval().requires_grad_(False)
    fold_batch_norms(model)
    if channels_last:
        to_channels_last(model)
    if dtype is not None:
        _compute_in(dtype, model)
    if compile:
        compile_dense_parts(model, dynamic=True)
    elif device.type == "cpu":
        use_onednn(model)
    model.is_prepared_for_inference = True
    model.train = functools.partial(_refuse_training, model)
    model._register_load_state_dict_pre_hook(_refuse_loading)
    return model


def prepare_as_configured(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """`prepare_for_inference`, in place, if and as a config says.

    Args:
        model: with its weights, on its device.
        settings: "enabled", "channels_last", "precision" (see `inference_dtype`) and "compile":
            `train.prepare` of a LazyConfig, TEST.PREPARE of a YAML config with lower-case keys.
    """
    if not settings["enabled"]:
        return model
    dtype = inference_dtype(settings["precision"], next(model.parameters()).device)
    return prepare_for_inference(
        model, settings["channels_last"], dtype, settings["compile"], inplace=True
    )


def inference_dtype(precision: str, device: torch.device) -> Optional[torch.dtype]:
    """Type that a config names.

    Args:
        precision: "float32", "bfloat16", "float16", or "auto": bfloat16 where the device computes
            in it natively, else float32.
        device: of the model.

    Returns:
        The type, None for float32.

    Raises:
        ValueError: for an unknown name.
    """
    key = "train.prepare.precision (TEST.PREPARE.PRECISION)"
    if check_choice("Inference", "precision", precision, ["auto", *_DTYPES], key) == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else None
    return _DTYPES[precision]


def _check_model(model: nn.Module) -> None:
    backbone = getattr(model, "backbone", None)
    head = getattr(getattr(model, "proposal_generator", None), "head", None)
    if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module):
        raise ValueError(
            "prepare_for_inference takes an ATSSDetector or a two-stage model with ATSS as "
            "proposal generator (a backbone and a proposal_generator.head), got "
            f"{type(model).__name__}. Unwrap data-parallel models (model.module)."
        )
    if "is_prepared_for_inference" in model.__dict__:
        raise ValueError("This model is prepared for inference already; prepare a trained one.")


def _check_dtype(dtype: Optional[torch.dtype], device: torch.device) -> None:
    if dtype not in _DTYPES.values():
        raise ValueError(
            "prepare_for_inference takes dtype None (float32), torch.bfloat16 or torch.float16, "
            f"got {dtype}."
        )
    if dtype == torch.float16 and device.type != "cuda":
        raise ValueError(
            f"Inference in float16 needs a GPU, the model is on {device.type!r}. Use bfloat16 "
            "(train.prepare.precision, TEST.PREPARE.PRECISION)."
        )


def _compute_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Change the type of backbone and head; what enters and leaves them stays float32."""
    head, roi_heads = model.proposal_generator.head, getattr(model, "roi_heads", None)
    model.backbone.to(dtype)
    head.to(dtype)
    # Functions of the module and no closures, so that prepared models can be copied and pickled.
    model.backbone.register_forward_pre_hook(functools.partial(_images_to, dtype))
    head.register_forward_hook(_predictions_to_float32)
    if roi_heads is not None:
        roi_heads.register_forward_pre_hook(_features_to_float32)


def _images_to(dtype: torch.dtype, module: nn.Module, inputs: Any) -> Any:
    images, *others = inputs
    return (images.to(dtype), *others)


def _predictions_to_float32(
    module: nn.Module, inputs: Any, outputs: DensePredictions
) -> DensePredictions:
    return outputs.map(Tensor.float)


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


def _refuse_loading(*_: Any) -> None:
    raise RuntimeError(
        "This model is prepared for inference: its norms are folded into its convolutions, so that "
        "weights of a checkpoint mean something else. Load them first, then prepare the model."
    )
