"""ATSS, ResNet-50, DCNv2, 1x (the authors' atss_dcnv2_R_50_FPN_1x).

3x3 convolutions of res3 to res5 and the last of both towers are deformable and modulated.
"""

from .atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Release",
    number=6,
    title="ResNet-50, DCNv2, 1x",
    ap=43.2,
    source="release",
    split="minival",
    parent="coco/atss_R_50_FPN_1x",
    changes=[
        "model.backbone.deform_on_per_stage",
        "model.head.deformable: False -> True",
    ],
)

model.backbone.deform_on_per_stage = [False, True, True, True]
model.head.deformable = True
train.output_dir = "output/atss_dcnv2_R_50_FPN_1x"
