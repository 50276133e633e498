"""ATSS, ResNeXt-101-64x4d, 2x (the authors' atss_X_101_64x4d_FPN_2x).

The stride is in the 3x3 convolution. Initial weights are those of the authors,
from Detectron; they need the same mean and deviation as MSRA's.
"""

from .atss_R_101_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Release",
    number=5,
    title="ResNeXt-101-64x4d, 2x",
    ap=45.5,
    source="release",
    split="minival",
    parent="coco/atss_R_101_FPN_2x",
    changes=[
        "model.backbone.num_groups: 1 -> 64",
        "model.backbone.width_per_group: 64 -> 4",
        "model.backbone.stride_in_1x1: True -> False",
        "train.init_checkpoint",
    ],
)

model.backbone.num_groups = 64
model.backbone.width_per_group = 4
model.backbone.stride_in_1x1 = False
train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/X-101-64x4d"
train.output_dir = "output/atss_X_101_64x4d_FPN_2x"
