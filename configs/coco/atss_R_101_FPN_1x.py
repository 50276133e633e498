"""ATSS, ResNet-101, 1x (the authors' atss_R_101_FPN_1x).

Not in the paper; mmdetection publishes weights too.
"""

from .atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Release",
    number=2,
    title="ResNet-101, 1x",
    ap=41.5,
    source="mmdetection",
    split="minival",
    parent="coco/atss_R_50_FPN_1x",
    changes=[
        "model.backbone.depth: 50 -> 101",
        "train.init_checkpoint",
    ],
)

model.backbone.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.output_dir = "output/atss_R_101_FPN_1x"
