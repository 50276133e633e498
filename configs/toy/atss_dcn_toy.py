"""ATSS with deformable towers (DCNv2) on the embedded shapes. Not in the paper.

Parent: atss_toy.py. The backbone stays as it is: a ResNet-18 has no bottlenecks, where
deformable convolutions would go.
"""

from .atss_toy import dataloader, lr_multiplier, model, optimizer, train

model.head.deformable = True
train.output_dir = "output/atss_dcn_toy"
