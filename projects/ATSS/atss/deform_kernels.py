"""Which implementation computes a deformable convolution on a GPU?"""

from typing import List, Optional, Tuple

from torch import Tensor

from detectron2.layers import deform_conv as d2_deform

__all__ = ["detectron2_deform_conv", "selected", "set_deform_kernel"]

_KERNELS = ("torchvision", "detectron2")
_kernel = "torchvision"


def set_deform_kernel(name: str) -> None:
    """Choose which kernel every `DeformConv2d` runs on CUDA; elsewhere it is always torchvision's.

    Which of the two is faster has not been measured; torchvision's, the default, is the one that
    exports.

    Args:
        name: "torchvision", or "detectron2" where Detectron2 was compiled with CUDA.

    Raises:
        ValueError: for another name.
        ImportError: for "detectron2" where it was not compiled.
    """
    global _kernel
    if name not in _KERNELS:
        raise ValueError(f"Unknown kernel {name!r} for set_deform_kernel; known are {_KERNELS}.")
    if name == "detectron2":
        try:
            from detectron2 import _C  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "set_deform_kernel('detectron2') needs Detectron2's compiled part, detectron2._C, "
                "which this installation lacks. Build Detectron2 from source or keep 'torchvision'."
            ) from error
    _kernel = name


def selected() -> str:
    """Name of the kernel that runs on CUDA."""
    return _kernel


def detectron2_deform_conv(
    x: Tensor,
    offset: Tensor,
    mask: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    stride: Tuple[int, int],
    padding: Tuple[int, int],
    dilation: Tuple[int, int],
    groups: int,
    deformable_groups: int,
) -> Tensor:
    """Detectron2's CUDA kernels, for contiguous tensors of one type.

    Args:
        x, offset, mask: see `DeformConv2d.forward`.
        weight: (out_channels, in_channels / groups, kh, kw).
        bias: (out_channels,) or None.
        stride, padding, dilation: of rows and columns.
        groups, deformable_groups: see `DeformConv2d`.

    Returns:
        (N, out_channels, Ho, Wo).

    Raises:
        ValueError: for windows that differ between the axes, which its modulated kernel lacks.
    """
    window: List = [stride, padding, dilation, groups]
    if mask is None:
        out = d2_deform.deform_conv(x, offset, weight, *window, deformable_groups)
        return out if bias is None else out + bias.view(1, -1, 1, 1)
    for i, (first, second) in enumerate(window[:3]):
        if first != second:
            raise ValueError(
                "Detectron2's modulated kernel takes the same stride, padding and dilation for "
                f"both axes, got {window[:3]}. Call set_deform_kernel('torchvision')."
            )
        window[i] = first
    return d2_deform.modulated_deform_conv(
        x, offset, mask, weight, bias, *window, deformable_groups
    )
