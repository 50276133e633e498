"""The zero point of every study: RetinaNet with one 8S square per location (Table 1, first row).

Positives by IoU, boxes regressed from anchors with smooth L1, and none of the improvements of
Table 1. It starts from the full method, atss.py, whose backbone, pyramid and test-time settings it
keeps.
"""

from atss.assigners import IoUAssigner

from detectron2.config import LazyCall as L

from .atss import model

# "+ In GT Box" (Table 1) is an argument of the rule; without it, any anchor may be positive.
model.assigner = L(IoUAssigner)(
    thresholds=[0.4, 0.5], allow_low_quality_matches=True, center_in_gt=False
)
model.head.norm = ""
model.head.centerness = False
model.head.level_scales = False
model.loss.box_loss = "smooth_l1"  # beta 0.11 on deltas
model.loss.box_loss_weight = 0.25  # RetinaNet divides by four times the positives
