"""Folding batch norms with fixed statistics into the convolutions before them.

With fixed statistics a norm is a scale and a shift of its input, which the weights and bias of the
convolution can hold. GroupNorm computes its statistics from every image and stays.
"""

from collections import Counter

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from detectron2.layers import FrozenBatchNorm2d

from ..layers import DeformConv2d


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> int:
    """Fold every batch norm that is frozen, or in evaluation mode, into the convolution before it.

    Folds norms that a convolution holds itself, as Detectron2's `Conv2d` and our `DeformConv2d` do
    (`conv.norm`), and those that follow a convolution in an `nn.Sequential`. Other norms stay, and
    so do those after a convolution that several places share.

    Args:
        model: in evaluation mode; changed in place.

    Returns:
        How many norms were folded.
    """
    owners = Counter(id(child) for module in model.modules() for child in module.children())
    count = 0
    for module in list(model.modules()):
        if _is_convolution(module) and _is_fixed(getattr(module, "norm", None)):
            _fold(module, module.norm)
            module.norm = None
            count += 1
        if not isinstance(module, nn.Sequential):
            continue
        for i in range(len(module) - 1):
            conv, norm = module[i], module[i + 1]
            is_plain = _is_convolution(conv) and not _has_norm_or_activation(conv)
            if is_plain and _is_fixed(norm) and owners[id(conv)] == 1:
                _fold(conv, norm)
                module[i + 1] = nn.Identity()
                count += 1
    return count


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, DeformConv2d))


def _has_norm_or_activation(conv: nn.Module) -> bool:
    activation = getattr(conv, "activation", None)
    has_activation = activation is not None and not isinstance(activation, nn.Identity)
    return getattr(conv, "norm", None) is not None or has_activation


def _is_fixed(norm: object) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    # SyncBatchNorm and Detectron2's variants are `_BatchNorm`, too.
    is_batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return is_batch_norm and not norm.training and norm.running_var is not None


def _fold(conv: nn.Module, norm: nn.Module) -> None:
    # In float64, so that folding itself does not round.
    parts = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, var, scale, shift = (x if x is None else x.double() for x in parts)
    folded = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift)
    dtype = conv.weight.dtype
    conv.weight, conv.bias = (nn.Parameter(x.to(dtype), requires_grad=False) for x in folded)
