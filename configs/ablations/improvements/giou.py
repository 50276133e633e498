"""Table 1, row 3: + GIoU loss.

Our reading of the paper: weight 2 as in the full method, divided by the number of positives without
centerness.
"""

from .group_norm import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 1",
    number=3,
    title="+ GIoU loss",
    ap=34.9,
    source="paper",
    split="minival",
    parent="ablations/improvements/group_norm",
    changes=[
        'model.loss.box_loss: "smooth_l1" -> "giou"',
        "model.loss.box_loss_weight: 0.25 -> 2.0",
    ],
)

model.loss.box_loss = "giou"
model.loss.box_loss_weight = 2.0
train.output_dir = "output/ablations/improvements/giou"
