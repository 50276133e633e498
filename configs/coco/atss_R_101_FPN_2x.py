"""ATSS, ResNet-101, 2x (the authors' atss_R_101_FPN_2x). The release's AP on minival: 43.5.

Twice the iterations, short edges of 640 to 800. Parent: atss_R_101_FPN_1x.py.
"""

from ..common.data.coco import multi_scale_resize as _multi_scale_resize
from ..common.schedule import lr_multiplier_2x as lr_multiplier
from .atss_R_101_FPN_1x import dataloader, model, optimizer, train

dataloader.train.mapper.augmentations[0] = _multi_scale_resize
train.max_iter = 180000
train.output_dir = "output/atss_R_101_FPN_2x"
