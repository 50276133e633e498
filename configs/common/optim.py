"""Optimizer of the paper: SGD, lr 0.01 for 16 images; biases have twice that and no decay."""

import torch
from atss.training.optimizer import get_optimizer_params

from detectron2.config import LazyCall as L

optimizer = L(torch.optim.SGD)(
    # `params.model` is set where the optimizer is built.
    params=L(get_optimizer_params)(
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        bias_lr_factor=2.0,
        weight_decay_bias=0.0,
    ),
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
)
