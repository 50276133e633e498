"""Copies between host and device without waiting, and what a device and its torch can do.

A copy from ordinary, pageable memory waits for all work that is queued on the GPU; one from pinned
memory does not.
"""

import warnings
from typing import Any, Callable, Optional, Sequence, Set

import torch
from torch import Tensor, nn

from detectron2.structures import Boxes, Instances


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the copy is queued behind the work that is queued already.

    Args:
        tensor: returned itself if on the device already; else must not be written to before the
            copy is done.
        device: of the result.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def host_constant(
    values: Sequence, device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A (nested) sequence of numbers as a tensor; `torch.tensor` on the GPU would wait."""
    return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)


def instances_to_device(instances: Instances, device: torch.device) -> Instances:
    """`Instances.to`, which would wait once for every field.

    Tensors and `Boxes` are copied as `to_device` does, other fields by their own `to`, and those
    without one are kept.
    """
    moved = Instances(instances.image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Tensor):
            value = to_device(value, device)
        elif type(value) is Boxes:
            value = Boxes(to_device(value.tensor, device))
        elif hasattr(value, "to"):
            value = value.to(device)
        moved.set(name, value)
    return moved


class CompiledWhereSupported:
    """A function, compiled on its first call (`torch.compile`, any shapes).

    Compilation needs Triton on a GPU and a C++ compiler on a CPU. Where it fails, a warning says so
    once, and the function runs uncompiled from then on.
    """

    def __init__(self, function: Callable):
        self.function = function
        self._compiled = None
        self._failed = False

    def __call__(self, *args) -> Any:
        if self._failed:
            return self.function(*args)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self.function, dynamic=True)
            return self._compiled(*args)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways
            self._failed = True
            warnings.warn(
                f"{self.function.__name__} could not be compiled and runs uncompiled from now on: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                stacklevel=2,
            )
            return self.function(*args)


def compile_dense_parts(model: nn.Module, dynamic: Optional[bool] = None) -> nn.Module:
    """Let backbone and dense head run through `torch.compile`; the rest stays as it is.

    Names of parameters stay, so checkpoints fit. The first step takes minutes. On a CPU this needs
    a C++ compiler.

    Args:
        model: `ATSSDetector` or a two-stage model; changed in place.
        dynamic: compile for images of any size at once; None compiles for the first size, and for
            any size when there is a second.

    Raises:
        ValueError: for a torch that cannot compile a module in place.
    """
    if not hasattr(nn.Module, "compile"):
        raise ValueError(
            f"torch {torch.__version__} cannot compile parts of a model, 2.2 can. Update it, "
            "or set train.compile and train.prepare.compile (SOLVER.COMPILE, TEST.PREPARE.COMPILE) "
            "to False."
        )
    for part in (model.backbone, model.proposal_generator.head):
        part.compile(dynamic=dynamic)
    return model


def is_compiling() -> bool:
    """Whether `torch.compile` or `torch.export` is tracing the caller."""
    # torch 2.0 has no torch.compiler, and has torch._dynamo only once something compiles; 2.1 and
    # 2.2 have the function in the second place.
    for name in ("compiler", "_dynamo"):
        namespace = getattr(torch, name, None)
        if hasattr(namespace, "is_compiling"):
            return namespace.is_compiling()
    return False


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 on a device, by its instruction set."""
    if device.type == "cuda":
        # From Ampere on. `torch.cuda.is_bf16_supported` also counts emulation, which is slow.
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not _cpu_features().isdisjoint(("avx512_bf16", "amx_bf16"))


def to_channels_last(model: nn.Module) -> nn.Module:
    """A model with channels last in memory, changed in place, where that cannot crash.

    Raises:
        ValueError: for a convolution that ends the process on this CPU.
    """
    device = next(model.parameters()).device
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if device.type == "cpu" and version >= (2, 15) and "amx_tile" in _cpu_features():
        for name, module in model.named_modules():
            is_conv = isinstance(module, nn.Conv2d)
            window = (module.in_channels, module.kernel_size, module.stride) if is_conv else None
            if window == (8, (1, 1), (2, 2)):
                raise ValueError(
                    f"torch {torch.__version__} crashes on CPUs with AMX in {name}, a 1x1 "
                    "convolution of 8 channels with stride 2, if channels come last. Set train."
                    "channels_last and train.prepare.channels_last (SOLVER.CHANNELS_LAST, TEST."
                    "PREPARE.CHANNELS_LAST) to False, or give model.backbone more channels."
                )
    return model.to(memory_format=torch.channels_last)


def _cpu_features() -> Set[str]:
    try:
        with open("/proc/cpuinfo") as file:
            lines = (line.split() for line in file if line.startswith("flags"))
            return set(next(lines, ()))
    except OSError:
        return set()
