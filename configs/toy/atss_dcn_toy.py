"""ATSS with deformable towers (DCNv2) on the embedded shapes. Not in the paper.

Parent: atss_toy.py. The backbone has no deformable convolutions: they replace those of bottleneck
blocks, which a ResNet-18 lacks.
"""

from .atss_toy import dataloader, lr_multiplier, model, optimizer, train

model.head.deformable = True
train.output_dir = "output/atss_dcn_toy"
