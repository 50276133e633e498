"""Table 1, row 6: + Scalar, one per level.

All five improvements. The two differences that remain between this and FCOS are those of Table 2.
"""

from .centerness import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 1",
    number=6,
    title="+ Scalar, one per level",
    ap=37.0,
    source="paper",
    split="minival",
    parent="ablations/improvements/centerness",
    changes=["model.head.level_scales: False -> True"],
)

model.head.level_scales = True
train.output_dir = "output/ablations/improvements/level_scales"
