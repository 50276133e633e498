"""Whole detectors on one batch: a training step and a detection, ours and Detectron2's."""

import copy
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from atss.device import compile_dense_parts, has_fast_bfloat16
from atss.inference_mode.batch_norms import fold_batch_norms
from atss.inference_mode.prepare import prepare_for_inference
from atss.model_zoo import get_config
from benchmark_peers import fcos_detector, has_fcos, retinanet_detector
from benchmark_scenes import random_instances
from benchmark_scope import Case, Scope
from benchmark_timing import Contestant
from torch import nn

from detectron2.config import instantiate

__all__ = ["MODELS", "share_outside_convolution"]


def train_cases(scope: Scope) -> Iterator[Case]:
    """Forward, backward and optimizer step."""
    for batch_size in scope.model_batch_sizes:
        batch = _make_batch(scope, batch_size)
        models = _detectors(scope)
        ours = models["ATSS"]
        contestants = [_train_contestant("ATSS", ours, batch)]
        last = copy.deepcopy(ours).to(memory_format=torch.channels_last)
        contestants.append(_train_contestant("ATSS, channels_last", last, batch))
        if has_fast_bfloat16(scope.device):
            name = "ATSS, channels_last, bfloat16"
            contestants.append(_train_contestant(name, copy.deepcopy(last), batch, torch.bfloat16))
        if scope.compile:
            name = "ATSS, channels_last, compiled"
            compiled = compile_dense_parts(copy.deepcopy(last))
            contestants.append(_train_contestant(name, compiled, batch))
        for name, model in models.items():
            if name != "ATSS":
                contestants.append(_train_contestant(name, model, batch))
            if name != "ATSS" and has_fast_bfloat16(scope.device):
                last = copy.deepcopy(model).to(memory_format=torch.channels_last)
                name = f"{name}, channels_last, bfloat16"
                contestants.append(_train_contestant(name, last, batch, torch.bfloat16))
        yield _case(scope, "train", batch_size, _runnable(contestants))


def inference_cases(scope: Scope) -> Iterator[Case]:
    """Detection, from image tensors to instances."""
    for batch_size in scope.model_batch_sizes:
        batch = _make_batch(scope, batch_size)
        models = {name: model.eval() for name, model in _detectors(scope).items()}
        ours = models["ATSS"]
        contestants = [
            _inference_contestant("ATSS", ours, batch),
            _inference_contestant("ATSS, prepared", prepare_for_inference(ours), batch),
        ]
        if has_fast_bfloat16(scope.device):
            prepared = prepare_for_inference(ours, dtype=torch.bfloat16)
            contestants.append(_inference_contestant("ATSS, prepared, bfloat16", prepared, batch))
        if scope.compile:
            prepared = prepare_for_inference(ours, compile=True)
            contestants.append(_inference_contestant("ATSS, prepared, compiled", prepared, batch))
        for name, model in models.items():
            if name != "ATSS":
                contestants.append(_inference_contestant(name, model, batch))
            if name != "ATSS" and has_fast_bfloat16(scope.device):
                last = copy.deepcopy(model).to(memory_format=torch.channels_last)
                name = f"{name}, channels_last, bfloat16"
                contestants.append(_inference_contestant(name, last, batch, torch.bfloat16))
        yield _case(scope, "inference", batch_size, _runnable(contestants))


def step_cases(scope: Scope) -> Iterator[Case]:
    """Detection after each step of `prepare_for_inference`."""
    for batch_size in scope.model_batch_sizes:
        batch = _make_batch(scope, batch_size)
        model = _detectors(scope)["ATSS"].eval()
        folded = copy.deepcopy(model)
        fold_batch_norms(folded)
        last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
        steps = {"as trained": model, "norms folded": folded, "and channels_last": last}
        contestants = [_inference_contestant(*step, batch) for step in steps.items()]
        name = "and fused operators: prepared"
        contestants.append(_inference_contestant(name, prepare_for_inference(model), batch))
        if scope.compile:
            prepared = prepare_for_inference(model, compile=True)
            contestants.append(_inference_contestant("prepared, compiled", prepared, batch))
        if has_fast_bfloat16(scope.device):
            last = copy.deepcopy(model).to(memory_format=torch.channels_last)
            name = "as trained, channels_last, bfloat16 autocast"
            contestants.append(_inference_contestant(name, last, batch, torch.bfloat16))
            prepared = prepare_for_inference(model, dtype=torch.bfloat16)
            contestants.append(_inference_contestant("prepared, bfloat16", prepared, batch))
        yield _case(scope, "steps", batch_size, _runnable(contestants))


MODELS = {"train": train_cases, "inference": inference_cases, "steps": step_cases}


def share_outside_convolution(contestant: Contestant, device: torch.device) -> float:
    """Part of a call's time that is not spent in convolutions, forward or backward, in [0, 1]."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] + ([kinds.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profile:
        contestant.call(None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    total = convolution = 0.0
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: the operator that launched it has its time, and a name we know
        if device.type == "cuda":
            # torch < 2.4 says cuda instead of device
            seconds = getattr(event, "self_device_time_total", None)
            seconds = event.self_cuda_time_total if seconds is None else seconds
        else:
            seconds = event.self_cpu_time_total
        total += seconds
        convolution += seconds if "conv" in event.key.lower() else 0.0
    return 1 - convolution / total


def _detectors(scope: Scope) -> Dict[str, nn.Module]:
    """Ours and peers by name, on equal backbones with equal classes; weights are random."""
    cfg = get_config(scope.model).model
    cfg.num_classes = scope.num_classes
    num_convs = cfg.head.num_convs
    models = {"ATSS": instantiate(cfg)}
    if has_fcos():
        models["FCOS"] = fcos_detector(instantiate(cfg.backbone), cfg, num_convs)
    models["RetinaNet"] = retinanet_detector(instantiate(cfg.backbone), cfg, num_convs)
    return {name: model.to(scope.device) for name, model in models.items()}


def _make_batch(scope: Scope, batch_size: int) -> List[Dict[str, Any]]:
    height, width = scope.image_size
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(3, height, width, generator=generator) * 255,
            "height": height,
            "width": width,
            "instances": random_instances(
                7 + i % 14, scope.image_size, scope.num_classes, torch.device("cpu"), i
            ),
        }
        for i in range(batch_size)
    ]


def _train_contestant(
    name: str, model: nn.Module, batch: Sequence[Dict], dtype: Optional[torch.dtype] = None
) -> Contestant:
    model.train()
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A rate that leaves random weights as they are: steps must not diverge while they are timed.
    optimizer = torch.optim.SGD(parameters, lr=1e-8, momentum=0.9, weight_decay=1e-4)

    def step(_: Any) -> Dict[str, torch.Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        return losses

    return Contestant(name, step)


def _inference_contestant(
    name: str, model: nn.Module, batch: Sequence[Dict], dtype: Optional[torch.dtype] = None
) -> Contestant:
    device = next(model.parameters()).device

    @torch.no_grad()
    def detect(_: Any) -> List[Dict]:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(batch)

    return Contestant(name, detect)


def _runnable(contestants: Sequence[Contestant]) -> List[Contestant]:
    """Those that run; peers need not in every precision."""
    runnable = []
    for contestant in contestants:
        try:
            contestant.call(None)
            runnable.append(contestant)
        except RuntimeError as error:
            print(f"{contestant.name} does not run here: {str(error).splitlines()[0]}")
    return runnable


def _case(scope: Scope, part: str, batch_size: int, contestants: List[Contestant]) -> Case:
    settings = {
        "model": scope.model,
        "images": batch_size,
        "size": f"{scope.image_size[0]}x{scope.image_size[1]}",
        "classes": scope.num_classes,
    }
    return Case(part, settings, contestants)
