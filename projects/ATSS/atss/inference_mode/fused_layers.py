"""How do convolutions run faster on a CPU? With weights in oneDNN's own layout, and ReLU built in.

torch rearranges the weights of a convolution on every call, passes small ones to a slower path, and
reads and writes each activation again for bias, addition and ReLU. oneDNN's fused operators, which
`torch.compile` also emits, do none of that. They are not a public interface of torch, so everything
here falls back to what a layer did before: without the operators, on a GPU, when a gradient is
wanted, while tracing or compiling.
"""

from functools import cache
from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet

from ..device import is_compiling

__all__ = ["FusedBasicBlock", "FusedBottleneckBlock", "FusedConv2d", "fuse_convolutions"]


class FusedConv2d(Conv2d):
    """Detectron2's `Conv2d` on oneDNN's operator; takes the place of `nn.Conv2d`, too.

    Made by `fuse_convolutions` from a layer that exists, which stays the same object with the same
    parameters. The rearranged weights are made on the first call, beside the parameters, and again
    when these change by `load_state_dict` or `to`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, Ho, Wo)."""
        x = self.convolve(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def convolve(self, x: Tensor, onto: Optional[Tensor] = None, relu: bool = False) -> Tensor:
        """Convolution without norm and activation, with what can be fused into it.

        Args:
            x: (N, in_channels, H, W).
            onto: (N, out_channels, Ho, Wo) added to the result, if given; may be overwritten by it.
            relu: apply a ReLU last.

        Returns:
            (N, out_channels, Ho, Wo).
        """
        if not _can_fuse(x, self.weight):
            x = self._conv_forward(x, self.weight, self.bias)
            x = x if onto is None else x.add_(onto)
            return F.relu(x) if relu else x
        window = (self.padding, self.stride, self.dilation, self.groups)
        if self.__dict__.get("_packed") is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight.detach(), *window, list(x.shape)
            )
        if onto is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self._packed, self.bias, *window, "relu" if relu else "none", [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            onto, x, self._packed, self.bias, *window, "add", 1.0, "relu" if relu else None, [], ""
        )

    def _apply(self, *args, **kwargs):
        self._packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> Dict[str, Any]:
        # oneDNN's layout can be neither copied nor saved.
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


class FusedBottleneckBlock(BottleneckBlock):
    """Detectron2's bottleneck with addition and ReLUs inside the convolutions.

    The sum is written over the shortcut. Where that is the input itself, only a block inside a
    stage (`owns_input`) may do so: the input of a stage is a feature that others read.
    """

    owns_input = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, Ho, Wo)."""
        out = self.conv2.convolve(self.conv1.convolve(x, relu=True), relu=True)
        return self.conv3.convolve(out, _shortcut(self, x), relu=True)


class FusedBasicBlock(BasicBlock):
    """Detectron2's basic block with addition and ReLUs inside the convolutions.

    It writes over its shortcut: see `FusedBottleneckBlock`.
    """

    owns_input = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, Ho, Wo)."""
        out = self.conv1.convolve(x, relu=True)
        return self.conv2.convolve(out, _shortcut(self, x), relu=True)


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    if block.shortcut is not None:
        return block.shortcut(x)
    return x if block.owns_input else x.clone()


_BLOCKS = {BottleneckBlock: FusedBottleneckBlock, BasicBlock: FusedBasicBlock}


def fuse_convolutions(model: nn.Module) -> int:
    """Let the convolutions of a model, and the residual blocks they form, run fused.

    Call it after folding: blocks whose convolutions still have a norm keep their own forward.
    Objects and parameters stay, only their class changes; a Python list that holds a layer, as in
    Detectron2's FPN, so needs no care.

    Args:
        model: changed in place.

    Returns:
        How many convolutions will run fused, 0 where this torch lacks the operators.
    """
    if not _has_operators():
        return 0
    count = 0
    for module in model.modules():
        if type(module) not in (nn.Conv2d, Conv2d) or module.padding_mode != "zeros":
            continue
        if isinstance(module.padding, str):
            continue
        if type(module) is nn.Conv2d:
            module.norm, module.activation = None, None
        module.__class__ = FusedConv2d
        count += 1
    for module in model.modules():
        if type(module) in _BLOCKS and all(
            isinstance(child, FusedConv2d) and child.norm is None and child.activation is None
            for child in module.children()
        ):
            module.__class__ = _BLOCKS[type(module)]
    for module in model.modules():
        if isinstance(module, ResNet):
            for stage in module.stages:
                for block in list(stage)[1:]:
                    block.owns_input = True
    return count


def _can_fuse(x: Tensor, weight: Tensor) -> bool:
    if torch.jit.is_tracing() or torch.jit.is_scripting() or is_compiling():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    is_known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return is_known and x.dtype == weight.dtype and x.numel() > 0


@cache
def _has_operators() -> bool:
    """Whether this torch has the operators, with the arguments and results we expect."""
    if not torch.backends.mkldnn.is_available():
        return False
    conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    x = torch.ones(1, 4, 5, 5)
    expected = F.relu(conv(x) + x)
    fused = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    fused.load_state_dict(conv.state_dict())
    fused.norm, fused.activation = None, None
    fused.__class__ = FusedConv2d
    try:
        return torch.allclose(fused.convolve(x, x.clone(), relu=True), expected, atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return False
