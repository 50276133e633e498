"""ATSS, ResNeXt-101-64x4d, 2x (the authors' atss_X_101_64x4d_FPN_2x).

The release's AP on minival: 45.5. The stride is in the 3x3 convolution. Weights are those the
authors start from, Detectron's own, which take the same mean and deviation as MSRA's. Parent:
atss_R_101_FPN_2x.py.
"""

from .atss_R_101_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.num_groups = 64
model.backbone.width_per_group = 4
model.backbone.stride_in_1x1 = False
train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/X-101-64x4d"
train.output_dir = "output/atss_X_101_64x4d_FPN_2x"
