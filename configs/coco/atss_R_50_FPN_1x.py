"""ATSS, ResNet-50, 1x (Table 3; the authors' atss_R_50_FPN_1x)."""

from ..common.data.coco import dataloader
from ..common.models.atss import model
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import train

row = dict(
    table="Release",
    number=1,
    title="ResNet-50, 1x",
    ap=39.3,
    source="paper",
    split="minival",
    same_as="common/models/atss",
)

train.output_dir = "output/atss_R_50_FPN_1x"
