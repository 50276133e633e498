"""Table 6, row 3: aspect ratio 1:1."""

from ...coco.atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 6",
    number=3,
    title="aspect ratio 1:1",
    ap=39.3,
    source="paper",
    split="minival",
    same_as="coco/atss_R_50_FPN_1x",
)

train.output_dir = "output/ablations/anchor_ratio/ratio1to1"
