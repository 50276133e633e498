"""ATSS, ResNet-101, DCNv2, 1x (the authors' atss_dcnv2_R_101_FPN_1x). No AP is known of it.

3x3 convolutions of res3 to res5 and the last of both towers are deformable and modulated. Parent:
atss_R_101_FPN_1x.py.
"""

from .atss_R_101_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.deform_on_per_stage = [False, True, True, True]
model.head.deformable = True
train.output_dir = "output/atss_dcnv2_R_101_FPN_1x"
