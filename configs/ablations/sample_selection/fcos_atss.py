"""Table 3, row 5: FCOS + ATSS.

AP50 57.3, AP75 42.4, APs 22.7, APm 43.1, APl 51.5 in the paper. IoU is that of the 8S squares
around the points, which FCOS itself does not have.
"""

from atss.assigners import ATSSAssigner

from detectron2.config import LazyCall as L

from .fcos import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 3",
    number=5,
    title="FCOS + ATSS",
    ap=39.2,
    source="paper",
    split="minival",
    parent="ablations/sample_selection/fcos",
    changes=["model.assigner: SSCAssigner -> ATSSAssigner"],
)

model.assigner = L(ATSSAssigner)(topk=9)
train.output_dir = "output/ablations/sample_selection/fcos_atss"
