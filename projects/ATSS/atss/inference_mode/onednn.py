"""Convolutions on oneDNN's own operators, for inference on a CPU.

torch rearranges the weights of a convolution on every call, and writes its result before a residual
block reads it again for the sum and the ReLU. oneDNN's operators, which `torch.compile` emits too,
take weights in their own layout and finish a residual block inside its last convolution. They are
not a public interface of torch, so layers compute as before without the operators, on a GPU, when
a gradient is needed, while tracing or compiling.
"""

from functools import cache
from typing import Any, Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, CNNBlockBase, ResNet

from ..device import is_compiling


class OneDNNConv2d(Conv2d):
    """Detectron2's `Conv2d` with its weights in oneDNN's layout; replaces `nn.Conv2d`, too.

    Made by `use_onednn` from an existing layer, which stays the same object with the same
    parameters. The rearranged weights are made on the first call, and again when `load_state_dict`
    or `to` change the parameters.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, Ho, Wo)."""
        if not _is_supported(x, self.weight):
            return super().forward(x)
        x = torch.ops.mkldnn._convolution_pointwise(x, *self._arguments(x), "none", [], "")
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def add_relu(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """ReLU of the sum of a shortcut and the convolution, without norm and activation.

        Args:
            x: (N, in_channels, H, W).
            shortcut: (N, out_channels, Ho, Wo); may be overwritten by the result.

        Returns:
            (N, out_channels, Ho, Wo).
        """
        if not _is_supported(x, self.weight):
            return F.relu(self(x) + shortcut)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, x, *self._arguments(x), "add", 1.0, "relu", [], ""
        )

    def _arguments(self, x: Tensor) -> Tuple:
        """What the operators take after x: weights, bias, geometry."""
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        if self.__dict__.get("_packed") is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight.detach(), *geometry, list(x.shape)
            )
        return (self._packed, self.bias, *geometry)

    def _apply(self, *args, **kwargs):
        self._packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> Dict[str, Any]:
        # oneDNN's layout can be neither copied nor saved.
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


class OneDNNResidualBlock(CNNBlockBase):
    """Detectron2's basic or bottleneck block, with sum and last ReLU inside the last convolution.

    The sum is written over the shortcut. Where that is the input itself, only a block inside a
    stage (`owns_input`) may do so: the input of a stage is a feature that others read.
    """

    owns_input = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, Ho, Wo)."""
        out, last = F.relu_(self.conv1(x)), self.conv2
        if hasattr(self, "conv3"):
            out, last = F.relu_(self.conv2(out)), self.conv3
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        else:
            shortcut = x if self.owns_input else x.clone()
        return last.add_relu(out, shortcut)


def use_onednn(model: nn.Module) -> int:
    """Let the convolutions of a model, and residual blocks, run on oneDNN's operators.

    Blocks whose convolutions have a norm keep their own forward, so fold norms before. Objects and
    parameters stay and only their class changes, so a Python list that holds a layer, as in
    Detectron2's FPN, still holds the right one.

    Args:
        model: changed in place.

    Returns:
        How many convolutions changed, 0 where this torch lacks the operators.
    """
    if not _has_operators():
        return 0
    convolutions = [
        module
        for module in model.modules()
        if type(module) in (nn.Conv2d, Conv2d)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ]
    for module in convolutions:
        _change_class(module)
    for module in model.modules():
        if type(module) in (BasicBlock, BottleneckBlock) and all(
            isinstance(child, OneDNNConv2d) and child.norm is None and child.activation is None
            for child in module.children()
        ):
            module.__class__ = OneDNNResidualBlock
        if isinstance(module, ResNet):
            for stage in module.stages:
                for block in list(stage)[1:]:
                    block.owns_input = True
    return len(convolutions)


def _change_class(convolution: nn.Conv2d) -> None:
    if type(convolution) is nn.Conv2d:
        convolution.norm, convolution.activation = None, None
    convolution.__class__ = OneDNNConv2d


def _is_supported(x: Tensor, weight: Tensor) -> bool:
    if torch.jit.is_tracing() or torch.jit.is_scripting() or is_compiling():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    has_type = x.dtype in (torch.float32, torch.bfloat16) and x.dtype == weight.dtype
    return has_type and x.device.type == "cpu" and x.numel() > 0


@cache
def _has_operators() -> bool:
    """Whether this torch has the operators, with the arguments and results that we expect."""
    if not torch.backends.mkldnn.is_available():
        return False
    conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    x = torch.ones(1, 4, 5, 5)
    expected = conv(x)
    _change_class(conv)
    try:
        found, found_sum = conv(x), conv.add_relu(x, x.clone())
    except (AttributeError, RuntimeError, TypeError):
        return False
    is_right = torch.allclose(found, expected, atol=1e-4)
    return is_right and torch.allclose(found_sum, F.relu(expected + x), atol=1e-4)
