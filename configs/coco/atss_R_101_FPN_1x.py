"""ATSS, ResNet-101, 1x (the authors' atss_R_101_FPN_1x). mmdetection's AP on minival: 41.5.

Not in the paper; mmdetection publishes weights too. Parent: atss_R_50_FPN_1x.py.
"""

from .atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.output_dir = "output/atss_R_101_FPN_1x"
