"""Table 1, row 1: RetinaNet (#A=1), the zero point.

Our reading of the paper: data, schedule, test-time thresholds and P6 from P5 are those of every
other row (Sec. 3.1), which is not RetinaNet's own recipe.
"""

from ...common.data.coco import dataloader
from ...common.models.retinanet_a1 import model
from ...common.optim import optimizer
from ...common.schedule import lr_multiplier_1x as lr_multiplier
from ...common.train import train

row = dict(
    table="Table 1",
    number=1,
    title="RetinaNet (#A=1), the zero point",
    ap=32.5,
    source="paper",
    split="minival",
    same_as="common/models/retinanet_a1",
)

train.output_dir = "output/ablations/improvements/retinanet_a1"
