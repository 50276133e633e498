"""Mask R-CNN on ATSS proposals, ResNet-50, 1x. Not in the paper; no AP has been measured."""

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_atss import model
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import train

dataloader.train.dataset.with_masks = True
dataloader.train.mapper.use_instance_mask = True
dataloader.evaluator.tasks = ["bbox", "segm"]
dataloader.train.dataset.num_classes = "${model.roi_heads.num_classes}"
train.output_dir = "output/mask_rcnn_atss_R_50_FPN_1x"
