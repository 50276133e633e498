"""Table 5, row 4: scale 8."""

from ...coco.atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 5",
    number=4,
    title="scale 8",
    ap=39.3,
    source="paper",
    split="minival",
    same_as="coco/atss_R_50_FPN_1x",
)

train.output_dir = "output/ablations/anchor_scale/scale8"
