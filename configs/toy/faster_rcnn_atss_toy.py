"""Faster R-CNN on ATSS proposals, on the embedded shapes. Not in the paper. Parent: atss_toy.py.

Recipe and thin ResNet-18 are the parent's. The second stage is smaller than on COCO and gets fewer
proposals.
"""

from ..common.models.faster_rcnn_atss import model
from .atss_toy import dataloader, lr_multiplier, optimizer, train

model.backbone.depth = 18
model.backbone.norm = "BN"
model.backbone.freeze_at = 0
model.backbone.stem_out_channels = 32
model.backbone.res2_out_channels = 32
model.backbone.out_channels = 64
model.proposal_generator.head.num_convs = 2
model.proposal_generator.selector.pre_nms_topk = [500, 1000]
model.proposal_generator.selector.post_nms_topk = [300, 1000]
model.roi_heads.num_classes = 6
model.roi_heads.batch_size_per_image = 64
model.roi_heads.box_head.fc_dims = [256, 256]
model.pixel_mean = [127.0, 127.0, 127.0]
model.pixel_std = [60.0, 60.0, 60.0]

dataloader.train.dataset.num_classes = "${model.roi_heads.num_classes}"
train.output_dir = "output/faster_rcnn_atss_toy"
