"""How do values of the host reach the device without waiting for the GPU?

A copy from ordinary, pageable memory waits for all work that is queued on the GPU; one from pinned
memory does not.
"""

from typing import Sequence

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

from .fused import is_compiling

__all__ = ["host_constant", "instances_to_device", "to_device"]


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
