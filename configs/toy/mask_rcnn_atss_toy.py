"""Mask R-CNN on ATSS proposals, on the embedded shapes and their outlines. Not in the paper.

Parent: faster_rcnn_atss_toy.py.
"""

from ..common.models.mask_rcnn_atss import model as full_size
from .faster_rcnn_atss_toy import dataloader, lr_multiplier, model, optimizer, train

for name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads[name] = full_size.roi_heads[name]
model.roi_heads.mask_head.conv_dims = [64, 64, 64]

dataloader.train.dataset.with_masks = True
dataloader.train.mapper.use_instance_mask = True
dataloader.evaluator.tasks = ["bbox", "segm"]
train.output_dir = "output/mask_rcnn_atss_toy"
