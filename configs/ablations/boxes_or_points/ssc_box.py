"""Table 2, row 3: spatial and scale constraint, box.

The paper's AP on minival: 37.8. Parent: iou_box.py. FCOS's rule on the centres of the anchors;
boxes are regressed from the 8S squares around them.
"""

from atss.assigners import SSCAssigner

from detectron2.config import LazyCall as L

from .iou_box import dataloader, lr_multiplier, model, optimizer, train

model.assigner = L(SSCAssigner)()
train.output_dir = "output/ablations/boxes_or_points/ssc_box"
