"""Deformable convolutions for every device.

Detectron2's own need its compiled part, train on a GPU only and cannot be scripted.
Those here hold the same parameters and take the same arguments, on torchvision's operator.
"""

from typing import Callable, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d

from detectron2.layers import deform_conv as d2_deform

from .checks import check_choice

_kernel = "torchvision"  # what `set_deform_kernel` set last
_WINDOW = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")


class DeformConv2d(nn.Module):
    """Deformable convolution: each tap of the kernel is displaced by an offset (DCNv1, DCNv2).

    Replaces Detectron2's `DeformConv` (called without a mask) and `ModulatedDeformConv` (with one):
    parameter names and order of offset channels are the same, so their weights load unchanged. It
    computes in float32 at least, because the operator supports neither bfloat16 nor mixed types;
    the result has the type of x.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            `nn.Conv2d`.
        deformable_groups: groups of input channels, each with its own offsets.
        norm: applied to the result, if given.
        activation: applied last, if given.

    Raises:
        ValueError: for channels that the groups do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Union[int, Tuple[int, int]],
        stride: Union[int, Tuple[int, int]] = 1,
        padding: Union[int, Tuple[int, int]] = 0,
        dilation: Union[int, Tuple[int, int]] = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: Optional[nn.Module] = None,
        activation: Optional[Callable[[Tensor], Tensor]] = None,
    ):
        super().__init__()
        for name, channels, divisor_name, divisor in (
            ("in_channels", in_channels, "groups", groups),
            ("out_channels", out_channels, "groups", groups),
            ("in_channels", in_channels, "deformable_groups", deformable_groups),
        ):
            if divisor < 1 or channels < 1 or channels % divisor:
                raise ValueError(
                    f"DeformConv2d needs {name} divisible by {divisor_name}, got {name}={channels} "
                    f"and {divisor_name}={divisor}."
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.norm = norm
        # TorchScript can call a function that is an attribute, but not ask whether it is None.
        self.activation = activation if activation is not None else nn.Identity()
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, offset: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Convolve with displaced taps.

        Args:
            x: (N, in_channels, H, W).
            offset: (N, deformable_groups * kh * kw * 2, Ho, Wo) displacement in pixels of x: group,
                then tap in row-major order, then (y, x).
            mask: (N, deformable_groups * kh * kw, Ho, Wo) factor of each tap, usually in [0, 1];
                None for DCNv1.

        Returns:
            (N, out_channels, Ho, Wo) of the type of x, unless norm or activation change it.

        Raises:
            ValueError: for channels or sizes that do not fit, or tensors on different devices.
            TypeError: for types that are not floating, or float64 mixed with others.
        """
        return self._deform(x, offset, mask)

    def _deform(self, x: Tensor, offset: Tensor, mask: Optional[Tensor]) -> Tensor:
        """`forward`, under a name by which TorchScript lets a subclass call it."""
        out = self._convolve(x, offset, mask)
        if self.norm is not None:
            out = self.norm(out)
        return self.activation(out)

    def _convolve(self, x: Tensor, offset: Tensor, mask: Optional[Tensor]) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        inputs, offsets, weight = x.to(dtype), offset.to(dtype), self.weight.to(dtype)
        factors = mask.to(dtype) if mask is not None else None
        bias = self.bias.to(dtype) if self.bias is not None else None
        # Graphs have torchvision's operator and no checks, which a trace would record as constants.
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            _check_inputs(self, x, offset, mask)
            if _kernel == "detectron2" and x.is_cuda:
                out = _detectron2_deform_conv(self, inputs, offsets, factors, weight, bias)
                return out.to(x.dtype)
        window = (self.stride, self.padding, self.dilation)
        return deform_conv2d(inputs, offsets, weight, bias, *window, factors).to(x.dtype)

    def extra_repr(self) -> str:
        names = (*_WINDOW, "groups", "deformable_groups")
        facts = [f"{name}={getattr(self, name)}" for name in names]
        return ", ".join([*facts, f"bias={self.bias is not None}"])


class PackedDeformConv2d(DeformConv2d):
    """`DeformConv2d` that predicts its own offsets, so that it can replace an `nn.Conv2d`.

    The offsets come from `conv_offset`, an ordinary convolution of the same window. It starts at
    zero: the layer then samples the regular grid, with all masks at 1/2.

    Args:
        in_channels, out_channels, kernel_size, bias: see `DeformConv2d`.
        *window, **options: its other arguments.
        modulated: also predict a mask (DCNv2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Union[int, Tuple[int, int]],
        *window,
        bias: bool = True,
        modulated: bool = True,
        **options,
    ):
        super().__init__(in_channels, out_channels, kernel_size, *window, bias=bias, **options)
        self.modulated = modulated
        num_taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            in_channels,
            self.deformable_groups * num_taps * (3 if modulated else 2),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, Ho, Wo)."""
        offset, mask = split_offsets(self.conv_offset(x), self.modulated)
        return self._deform(x, offset, mask)


def split_offsets(predictions: Tensor, modulated: bool) -> Tuple[Tensor, Optional[Tensor]]:
    """Offsets and mask from the output of an offset convolution, in the order of Detectron2.

    Args:
        predictions: (N, 3 * G * T, Ho, Wo) for G groups of T taps, offsets before mask logits; or
            (N, 2 * G * T, Ho, Wo) if not modulated.
        modulated: whether there is a mask.

    Returns:
        Offset (N, 2 * G * T, Ho, Wo), and mask (N, G * T, Ho, Wo) in (0, 1) or None.
    """
    if not modulated:
        return predictions, None
    first, second, mask = torch.chunk(predictions, 3, dim=1)
    return torch.cat((first, second), dim=1), mask.sigmoid()


def swap_deform_convs(model: nn.Module) -> nn.Module:
    """Replace Detectron2's deformable layers by `DeformConv2d`, with their weights.

    Afterwards the model trains on a CPU and can be exported. Parameters remain the same objects
    under the same names, so an existing optimizer still holds them.

    Args:
        model: any model; changed in place.

    Returns:
        The model, or its replacement if it is itself such a layer.
    """
    if isinstance(model, (d2_deform.DeformConv, d2_deform.ModulatedDeformConv)):
        return _from_detectron2(model)
    for name, child in model.named_children():
        swapped = swap_deform_convs(child)
        if swapped is not child:
            setattr(model, name, swapped)
    return model


def _from_detectron2(layer: nn.Module) -> DeformConv2d:
    names = (*_WINDOW, "groups", "deformable_groups", "norm", "activation")
    swapped = DeformConv2d(**{name: getattr(layer, name) for name in names})
    swapped.weight, swapped.bias = layer.weight, layer.bias
    return swapped.train(layer.training)


def _check_inputs(layer: DeformConv2d, x: Tensor, offset: Tensor, mask: Optional[Tensor]) -> None:
    if x.dim() != 4 or x.shape[1] != layer.in_channels:
        raise ValueError(
            f"DeformConv2d takes x of shape (N, {layer.in_channels}, H, W), got {tuple(x.shape)}."
        )
    offsets = {"offset": offset} if mask is None else {"offset": offset, "mask": mask}
    for name, tensor in {"weight": layer.weight, **offsets}.items():
        if tensor.device != x.device:
            raise ValueError(
                f"DeformConv2d has x on {x.device}, {name} on {tensor.device}. Move one of them to "
                "the device of the other."
            )
        is_floating = x.is_floating_point() and tensor.is_floating_point()
        if not is_floating or (x.dtype == torch.float64) != (tensor.dtype == torch.float64):
            raise TypeError(
                f"DeformConv2d has x of {x.dtype} but {name} of {tensor.dtype}; it takes float64 "
                "throughout, or float32, float16 and bfloat16."
            )
    window = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    size = tuple((n + 2 * p - (d * (k - 1) + 1)) // s + 1 for n, k, s, p, d in window)
    num_taps = layer.deformable_groups * layer.kernel_size[0] * layer.kernel_size[1]
    for (name, tensor), channels in zip(offsets.items(), (2 * num_taps, num_taps)):
        expected = (x.shape[0], channels, *size)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"DeformConv2d with kernel {layer.kernel_size}, deformable_groups="
                f"{layer.deformable_groups} and x of {tuple(x.shape)} needs {name} of shape "
                f"{expected}, got {tuple(tensor.shape)}."
            )


def set_deform_kernel(name: str) -> None:
    """Choose the kernel that every `DeformConv2d` runs on CUDA; elsewhere it is torchvision's.

    Which of the two is faster has not been measured. torchvision's, the default, is the one that
    can be exported.

    Args:
        name: "torchvision", or "detectron2" where Detectron2 was compiled with CUDA.

    Raises:
        ValueError: for another name.
        ImportError: for "detectron2" where it was not compiled.
    """
    global _kernel
    check_choice("set_deform_kernel", "name", name, ("torchvision", "detectron2"))
    if name == "detectron2":
        try:
            from detectron2 import _C  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "set_deform_kernel('detectron2') needs Detectron2's compiled part, detectron2._C, "
                "which this installation lacks. Build Detectron2 from source or keep 'torchvision'."
            ) from error
    _kernel = name


def _detectron2_deform_conv(
    layer: DeformConv2d,
    x: Tensor,
    offset: Tensor,
    mask: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
) -> Tensor:
    """Detectron2's CUDA kernels, for tensors of one type; shapes as in `DeformConv2d.forward`."""
    # The kernels read memory as if it were contiguous; of offset and mask they do not check it.
    x, offset, weight = x.contiguous(), offset.contiguous(), weight.contiguous()
    window, groups = (layer.stride, layer.padding, layer.dilation), layer.groups
    if mask is None:
        options = (*window, groups, layer.deformable_groups)
        out = d2_deform.deform_conv(x, offset, weight, *options)
        return out if bias is None else out + bias.view(1, -1, 1, 1)
    if any(first != second for first, second in window):
        raise ValueError(
            "Detectron2's modulated kernel takes the same stride, padding and dilation for both "
            f"axes, got {window}. Call set_deform_kernel('torchvision')."
        )
    options = (*(first for first, _ in window), groups, layer.deformable_groups)
    return d2_deform.modulated_deform_conv(x, offset, mask.contiguous(), weight, bias, *options)
