"""Parameter groups: the learning rate and decay of each parameter (recipe of Sec. 4)."""

from typing import Any, Dict, List, Optional

from torch import nn

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.LayerNorm,
)


def get_optimizer_params(
    model: nn.Module,
    base_lr: float,
    weight_decay: float = 1e-4,
    bias_lr_factor: float = 2.0,
    weight_decay_bias: float = 0.0,
    weight_decay_norm: Optional[float] = None,
) -> List[Dict[str, Any]]:
    """Parameter groups of the authors: biases learn twice as fast and do not decay.

    Every parameter called "bias" counts, those of normalisation layers too. (Detectron2's own
    helper treats them as parameters of the norm and leaves norms undecayed; here weights of norms
    and the scales of levels decay.)

    Args:
        model: frozen parameters are left out, shared ones taken once.
        base_lr: learning rate of everything but biases.
        weight_decay: decay of everything but biases.
        bias_lr_factor: learning rate of biases in units of `base_lr`.
        weight_decay_bias: decay of biases.
        weight_decay_norm: decay of the weights of normalisation layers; `weight_decay` if None.

    Returns:
        At most three groups for a torch optimizer, each with "params", "lr" and "weight_decay".

    Raises:
        ValueError: if nothing in the model can be trained.
    """
    # A tuple of (lr, decay) per kind; groups of equal values merge, which keeps optimizers fast.
    groups: Dict[Any, Dict[str, Any]] = {}
    seen = set()
    for module in model.modules():
        is_norm = isinstance(module, _NORMS)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = base_lr, weight_decay
            if name == "bias":
                lr, decay = base_lr * bias_lr_factor, weight_decay_bias
            elif is_norm and weight_decay_norm is not None:
                decay = weight_decay_norm
            group = {"params": [], "lr": lr, "weight_decay": decay}
            groups.setdefault((lr, decay), group)["params"].append(parameter)
    if not groups:
        raise ValueError("The model has no parameter that requires a gradient: nothing to train.")
    return list(groups.values())
