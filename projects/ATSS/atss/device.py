"""How do values of the host reach the device without waiting for the GPU?

A copy from ordinary, pageable memory waits for all work that is queued on the GPU; one from pinned
memory does not.
"""

import warnings
from typing import Callable, Sequence

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

__all__ = ["Fused", "host_constant", "instances_to_device", "is_compiling", "to_device"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, the copy queued behind the work that is there already.

    Args:
        tensor: of any shape; must not be written to before the copy is done.
        device: where the result lives.

    Returns:
        The tensor itself if it is there.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def host_constant(
    values: Sequence, device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Numbers the host knows, on the device; `torch.tensor(values, device="cuda")` would wait.

    Args:
        values: (nested) sequence of numbers.
        device: where the result lives.
        dtype: its type.

    Returns:
        Tensor of the shape of `values`.
    """
    return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)


def instances_to_device(instances: Instances, device: torch.device) -> Instances:
    """`Instances.to`, which would wait once for every field.

    Args:
        instances: fields of `Boxes` or tensors are copied as `to_device` does, others as their own
            `to` does, and those without one are kept.
        device: where the result lives.

    Returns:
        New `Instances` with the same fields.
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


class Fused:
    """A function, compiled on its first call (`torch.compile`, any shapes).

    Compilation needs Triton on a GPU and a C++ compiler on a CPU. Where it fails, that is said once
    and the function runs operator by operator from then on.

    Args:
        function: of tensors and numbers.
    """

    def __init__(self, function: Callable):
        self.function = function
        self._compiled = None
        self._failed = False

    def __call__(self, *args):
        if self._failed:
            return self.function(*args)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self.function, dynamic=True)
            return self._compiled(*args)
        except Exception as error:  # compilers fail in many ways; out of memory is not theirs
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self._failed = True
            warnings.warn(
                f"{self.function.__name__} could not be compiled and runs unfused from now on: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                stacklevel=2,
            )
            return self.function(*args)


def is_compiling() -> bool:
    """Whether `torch.compile` or `torch.export` is tracing the caller."""
    # torch 2.0 has no torch.compiler, and its torch._dynamo is there only once something compiles;
    # 2.1 and 2.2 have the function in the second place.
    for name in ("compiler", "_dynamo"):
        namespace = getattr(torch, name, None)
        if hasattr(namespace, "is_compiling"):
            return namespace.is_compiling()
    return False
