"""Table 4, row 4: k = 9."""

from ...coco.atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 4",
    number=4,
    title="k = 9",
    ap=39.3,
    source="paper",
    split="minival",
    same_as="coco/atss_R_50_FPN_1x",
)

train.output_dir = "output/ablations/topk/k9"
