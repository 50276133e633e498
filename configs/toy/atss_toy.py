"""ATSS on the embedded shapes, from scratch in minutes on two CPU cores. Not in the paper.

A thin ResNet-18 with batch norm, 64 channels in pyramid and head, images of 256 px. AdamW with a
cosine schedule, because SGD with the paper's schedule needs far longer from random weights.
"""

import torch
from fvcore.common.param_scheduler import CosineParamScheduler

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from ..common.data.coco import dataloader
from ..common.models.atss import model
from ..common.optim import optimizer
from ..common.train import train

model.backbone.depth = 18
model.backbone.norm = "BN"
model.backbone.freeze_at = 0
model.backbone.stem_out_channels = 32
model.backbone.res2_out_channels = 32
model.backbone.out_channels = 64
model.head.num_convs = 2
model.num_classes = 6
model.pixel_mean = [127.0, 127.0, 127.0]
model.pixel_std = [60.0, 60.0, 60.0]

dataloader.train.dataset.names = ["toy_shapes_train"]
dataloader.test.dataset.names = ["toy_shapes_val"]
dataloader.train.mapper.augmentations[0].short_edge_length = [256]
dataloader.test.mapper.augmentations[0].short_edge_length = 256
dataloader.train.num_workers = 1
dataloader.test.num_workers = 1

optimizer._target_ = torch.optim.AdamW
del optimizer.momentum
optimizer.lr = 0.001
optimizer.weight_decay = 0.05
optimizer.params.bias_lr_factor = 1.0

train.output_dir = "output/atss_toy"
train.init_checkpoint = ""
train.max_iter = 1000
train.amp.enabled = True
train.amp.precision = "auto"
train.channels_last = True
train.tta.base_size = 256
train.eval_period = 250
train.checkpointer.period = 500
train.seed = 1

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=0.05,
    warmup_method="linear",
    warmup_factor=0.02,
)
