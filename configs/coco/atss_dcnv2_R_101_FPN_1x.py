"""ATSS, ResNet-101, DCNv2, 1x (the authors' atss_dcnv2_R_101_FPN_1x).

3x3 convolutions of res3 to res5 and the last of both towers are deformable and modulated.
"""

from .atss_R_101_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Release",
    number=7,
    title="ResNet-101, DCNv2, 1x",
    ap=None,
    source=None,
    split=None,
    parent="coco/atss_R_101_FPN_1x",
    changes=[
        "model.backbone.deform_on_per_stage",
        "model.head.deformable: False -> True",
    ],
)

model.backbone.deform_on_per_stage = [False, True, True, True]
model.head.deformable = True
train.output_dir = "output/atss_dcnv2_R_101_FPN_1x"
