"""Table 3, row 2: RetinaNet (#A=1) + ATSS.

The paper's AP on minival: 39.3. Parent: retinanet_a1.py. AP50 57.5, AP75 42.8, APs 24.3, APm 43.3,
APl 51.3 in the paper. The full method, built from the zero point upwards: it equals
coco/atss_R_50_FPN_1x.py.
"""

from atss.assigners import ATSSAssigner

from detectron2.config import LazyCall as L

from .retinanet_a1 import dataloader, lr_multiplier, model, optimizer, train

model.assigner = L(ATSSAssigner)(topk=9)
train.output_dir = "output/ablations/sample_selection/retinanet_a1_atss"
