"""ATSS, ResNet-50, 1x (Table 3; the authors' atss_R_50_FPN_1x). The paper's AP on minival: 39.3."""

from ..common.data.coco import dataloader
from ..common.models.atss import model
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import train

train.output_dir = "output/atss_R_50_FPN_1x"
