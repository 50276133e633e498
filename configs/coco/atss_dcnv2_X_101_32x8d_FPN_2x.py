"""ATSS, ResNeXt-101-32x8d, DCNv2, 2x (the authors' atss_dcnv2_X_101_32x8d_FPN_2x).

The release's AP on minival: 47.7. 3x3 convolutions of res4 to res5 and the last of both towers are
deformable and modulated. Parent: atss_X_101_32x8d_FPN_2x.py.
"""

from .atss_X_101_32x8d_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.deform_on_per_stage = [False, False, True, True]
model.head.deformable = True
train.output_dir = "output/atss_dcnv2_X_101_32x8d_FPN_2x"
