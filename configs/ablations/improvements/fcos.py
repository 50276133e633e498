"""Table 1, row 7: FCOS.

FCOS with the improvements that came after its paper; its points lie in objects by definition.
"""

from ..boxes_or_points.ssc_point import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 1",
    number=7,
    title="FCOS",
    ap=37.8,
    source="paper",
    split="minival",
    same_as="ablations/boxes_or_points/ssc_point",
)

train.output_dir = "output/ablations/improvements/fcos"
