"""ATSS, ResNeXt-101-32x8d, 2x (the authors' atss_X_101_32x8d_FPN_2x).

The stride is in the 3x3 convolution. Initial weights are those of the authors,
from Detectron; they need the same mean and deviation as MSRA's.
"""

from .atss_R_101_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Release",
    number=4,
    title="ResNeXt-101-32x8d, 2x",
    ap=44.8,
    source="release",
    split="minival",
    parent="coco/atss_R_101_FPN_2x",
    changes=[
        "model.backbone.num_groups: 1 -> 32",
        "model.backbone.width_per_group: 64 -> 8",
        "model.backbone.stride_in_1x1: True -> False",
        "train.init_checkpoint",
    ],
)

model.backbone.num_groups = 32
model.backbone.width_per_group = 8
model.backbone.stride_in_1x1 = False
train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/X-101-32x8d"
train.output_dir = "output/atss_X_101_32x8d_FPN_2x"
