"""Table 3, row 2: RetinaNet (#A=1) + ATSS.

AP50 57.5, AP75 42.8, APs 24.3, APm 43.3, APl 51.3 in the paper. The full method, built up from
the zero point: it equals coco/atss_R_50_FPN_1x.py.
"""

from atss.assigners import ATSSAssigner

from detectron2.config import LazyCall as L

from .retinanet_a1 import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 3",
    number=2,
    title="RetinaNet (#A=1) + ATSS",
    ap=39.3,
    source="paper",
    split="minival",
    parent="ablations/sample_selection/retinanet_a1",
    changes=["model.assigner: IoUAssigner -> ATSSAssigner"],
)

model.assigner = L(ATSSAssigner)(topk=9)
train.output_dir = "output/ablations/sample_selection/retinanet_a1_atss"
