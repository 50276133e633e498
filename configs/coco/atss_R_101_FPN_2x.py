"""ATSS, ResNet-101, 2x (the authors' atss_R_101_FPN_2x).

Twice the iterations, short edges of 640 to 800.
"""

from ..common.data.coco import multi_scale_resize as _multi_scale_resize
from ..common.schedule import lr_multiplier_2x as lr_multiplier
from .atss_R_101_FPN_1x import dataloader, model, optimizer, train

row = dict(
    table="Release",
    number=3,
    title="ResNet-101, 2x",
    ap=43.5,
    source="release",
    split="minival",
    parent="coco/atss_R_101_FPN_1x",
    changes=[
        "lr_multiplier",
        "dataloader.train.mapper.augmentations.0",
        "train.max_iter: 90000 -> 180000",
    ],
)

dataloader.train.mapper.augmentations[0] = _multi_scale_resize
train.max_iter = 180000
train.output_dir = "output/atss_R_101_FPN_2x"
