"""Table 1, row 5: + Centerness.

With the branch the box loss of a positive is weighted by its centerness target, as in FCOS.
"""

from .in_gt_box import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 1",
    number=5,
    title="+ Centerness",
    ap=36.8,
    source="paper",
    split="minival",
    parent="ablations/improvements/in_gt_box",
    changes=["model.head.centerness: False -> True"],
)

model.head.centerness = True
train.output_dir = "output/ablations/improvements/centerness"
