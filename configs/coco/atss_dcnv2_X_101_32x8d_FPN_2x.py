"""ATSS, ResNeXt-101-32x8d, DCNv2, 2x (the authors' atss_dcnv2_X_101_32x8d_FPN_2x).

3x3 convolutions of res4 to res5 and the last of both towers are deformable and modulated.
"""

from .atss_X_101_32x8d_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Release",
    number=9,
    title="ResNeXt-101-32x8d, DCNv2, 2x",
    ap=47.7,
    source="release",
    split="minival",
    parent="coco/atss_X_101_32x8d_FPN_2x",
    changes=[
        "model.backbone.deform_on_per_stage",
        "model.head.deformable: False -> True",
    ],
)

model.backbone.deform_on_per_stage = [False, False, True, True]
model.head.deformable = True
train.output_dir = "output/atss_dcnv2_X_101_32x8d_FPN_2x"
