"""Parameter groups: the learning rate and decay of each parameter (recipe of Sec. 3.1)."""

from typing import Any, Dict, List, Optional, Tuple

from torch import nn

from detectron2.solver.build import get_default_optimizer_params


def get_optimizer_params(
    model: nn.Module,
    base_lr: float,
    weight_decay: float = 1e-4,
    bias_lr_factor: float = 2.0,
    weight_decay_bias: float = 0.0,
    weight_decay_norm: Optional[float] = None,
) -> List[Dict[str, Any]]:
    """Parameter groups of the authors: biases learn twice as fast and do not decay.

    Every parameter called "bias" counts, those of normalisation layers too; weights of norms and
    the scales of levels decay.

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
    # Detectron2 0.5 gives a group per parameter; few groups keep optimizers fast.
    groups: Dict[Tuple[float, float], Dict[str, Any]] = {}
    for group in get_default_optimizer_params(
        model, base_lr, weight_decay, weight_decay_norm, bias_lr_factor, weight_decay_bias
    ):
        lr, decay = group["lr"], group["weight_decay"]
        merged = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
        merged["params"] += group["params"]
    if not groups:
        raise ValueError("The model has no parameter that requires a gradient: nothing to train.")
    return list(groups.values())
