"""Table 6, row 3: aspect ratio 1:1.

The paper's AP on minival: 39.3. Same as ../../coco/atss_R_50_FPN_1x.py.
"""

from ...coco.atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "output/ablations/anchor_ratio/ratio1to1"
