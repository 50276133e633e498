"""Table 3, row 4: FCOS + center sampling.

AP50 57.4, AP75 41.4, APs 22.3, APm 42.5, APl 49.8 in the paper. Points within 1.5 strides of the
object's centre: the approximate form of ATSS that FCOS adopted (Sec. 4.2).
"""

from .fcos import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 3",
    number=4,
    title="FCOS + center sampling",
    ap=38.6,
    source="paper",
    split="minival",
    parent="ablations/sample_selection/fcos",
    changes=["model.assigner.center_sampling_radius: None -> 1.5"],
)

model.assigner.center_sampling_radius = 1.5
train.output_dir = "output/ablations/sample_selection/fcos_center_sampling"
