"""Cases of whole detectors on one batch: a training step and a detection, ours and Detectron2's."""

import copy
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from _reference_models import fcos, has_fcos, retinanet
from atss.device import compile_dense_parts, has_fast_bfloat16
from atss.inference_mode import prepare_for_inference
from atss.inference_mode.batch_norms import fold_batch_norms
from atss.model_zoo import get_config
from torch import nn

from detectron2.config import instantiate

from .cases import Case, Contestant, Options, size_text
from .synthetic import random_instances

# Name of a contestant, its model, and the type of autocast if any.
Variant = Tuple[str, nn.Module, Optional[torch.dtype]]
Work = Callable[[nn.Module, Sequence[Dict], Optional[torch.dtype]], Callable[[Any], Any]]


def _train_variants(options: Options) -> Iterator[Variant]:
    for name, model in detectors(options).items():
        yield name, model, None
        last = _channels_last(model)
        if name == "ATSS":
            yield f"{name}, channels_last", last, None
        if has_fast_bfloat16(options.device):
            last = copy.deepcopy(last)
            yield f"{name}, channels_last, bfloat16", last, torch.bfloat16
        if name == "ATSS" and options.compile:
            compiled = compile_dense_parts(_channels_last(model))
            yield f"{name}, channels_last, compiled", compiled, None


def _inference_variants(options: Options) -> Iterator[Variant]:
    for name, model in detectors(options).items():
        yield name, model.eval(), None
        if name == "ATSS":
            yield f"{name}, prepared", prepare_for_inference(model), None
            yield from _prepared_otherwise(options, model, f"{name}, prepared")
        elif has_fast_bfloat16(options.device):
            last = _channels_last(model)
            yield f"{name}, channels_last, bfloat16", last, torch.bfloat16


def _step_variants(options: Options) -> Iterator[Variant]:
    """The model after each step of `prepare_for_inference`."""
    model = detectors(options)["ATSS"].eval()
    yield "as trained", model, None
    folded = copy.deepcopy(model)
    fold_batch_norms(folded)
    yield "norms folded", folded, None
    yield "and channels_last", _channels_last(folded), None
    yield "and oneDNN operators: prepared", prepare_for_inference(model), None
    if has_fast_bfloat16(options.device):
        name = "as trained, channels_last, bfloat16 autocast"
        yield name, _channels_last(model), torch.bfloat16
    yield from _prepared_otherwise(options, model, "prepared")


def detectors(options: Options) -> Dict[str, nn.Module]:
    """Detectors by name, on equal backbones with equal classes; weights are random."""
    model = get_config(options.model).model
    model.num_classes = options.num_classes
    configs = {"ATSS": model}
    if has_fcos():
        configs["FCOS"] = fcos(model)
    configs["RetinaNet"] = retinanet(model)
    return {name: instantiate(cfg).to(options.device) for name, cfg in configs.items()}


def _prepared_otherwise(options: Options, model: nn.Module, name: str) -> Iterator[Variant]:
    if has_fast_bfloat16(options.device):
        yield f"{name}, bfloat16", prepare_for_inference(model, dtype=torch.bfloat16), None
    if options.compile:
        yield f"{name}, compiled", prepare_for_inference(model, compile=True), None


def _channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def _cases(
    part: str, variants: Callable[[Options], Iterator[Variant]], work: Work, options: Options
) -> Iterator[Case]:
    for batch_size in options.model_batch_sizes:
        batch = _make_batch(options, batch_size)
        contestants = []
        for name, model, dtype in list(variants(options)):  # copies first, before any has run
            contestant = Contestant(name, work(model, batch, dtype))
            try:  # Detectron2's models do not run in every precision.
                contestant.call(None)
                contestants.append(contestant)
            except RuntimeError as error:
                print(f"{name} does not run here: {str(error).splitlines()[0]}")
        settings = {
            "model": options.model,
            "images": batch_size,
            "size": size_text(options.image_size),
            "classes": options.num_classes,
        }
        yield Case(part, settings, contestants)


def _make_batch(options: Options, batch_size: int) -> List[Dict[str, Any]]:
    height, width = options.image_size
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(3, height, width, generator=generator) * 255,
            "height": height,
            "width": width,
            "instances": random_instances(
                7 + i % 14, options.image_size, options.num_classes, torch.device("cpu"), i
            ),
        }
        for i in range(batch_size)
    ]


def _training_step(
    model: nn.Module, batch: Sequence[Dict], dtype: Optional[torch.dtype]
) -> Callable[[Any], Any]:
    """Forward, backward and optimizer step."""
    model.train()
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # So low a rate keeps the random weights as they are: they must not diverge while timed.
    optimizer = torch.optim.SGD(parameters, lr=1e-8, momentum=0.9, weight_decay=1e-4)

    def step(_: Any) -> Dict[str, torch.Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        return losses

    return step


def _detection(
    model: nn.Module, batch: Sequence[Dict], dtype: Optional[torch.dtype]
) -> Callable[[Any], Any]:
    """From image tensors to instances."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def detect(_: Any) -> List[Dict]:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(batch)

    return detect


MODELS = {
    "train": partial(_cases, "train", _train_variants, _training_step),
    "inference": partial(_cases, "inference", _inference_variants, _detection),
    "steps": partial(_cases, "steps", _step_variants, _detection),
}
