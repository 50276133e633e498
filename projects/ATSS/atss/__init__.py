"""ATSS for Detectron2: importing it registers its models, parts and backbones.

"Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
Selection" (arXiv:1912.02424). The paper takes RetinaNet and FCOS apart along four axes; each is one
place here, and one entry of a config:

Axis 1 of 4: which anchors are positive.         `assigners/`          `model.assigner`
Axis 2 of 4: where regression starts.            `box_regression.py`   `model.box2box_transform`
Axis 3 of 4: the head and its losses.            `head.py`, `losses/`  `model.head`, `model.loss`
Axis 4 of 4: how many anchors a location has.    `anchors.py`          `model.anchor_generator`

Letters, the same in every file: N images of a batch, L pyramid levels, Hi and Wi height and width
of level i in locations, A anchors per location, Ri anchors of level i, R anchors of an image, M
objects of the batch, C candidate anchors of an object, S samples (pairs of an object and an
anchor), K classes, V values that a map holds of an anchor (K logits, 4 deltas or 1 quality), D
detections or proposals of an image, before suppression or after it, P points or pairs that a
function picks. A small letter is a part of the same: m of M objects. Only images and feature maps
are (N, C, H, W), channels, height and width, as everywhere in PyTorch.
"""

from .anchor_grid import AnchorGrid
from .anchors import GridAnchorGenerator, octave_sizes
from .assigners import (
    Assigner,
    Assignment,
    ATSSAssigner,
    IoUAssigner,
    PredictionAssigner,
    SimOTAAssigner,
    SSCAssigner,
    TopKAssigner,
)
from .backbone import build_atss_resnet_fpn_backbone, resnet_fpn
from .box_regression import Box2BoxTransform, PointToBoxTransform
from .build import ASSIGNER_REGISTRY, BOX2BOX_TRANSFORM_REGISTRY, CLASS_LOSS_REGISTRY, LOSS_REGISTRY
from .config import add_atss_config
from .data import defer_toy_shapes
from .detector import ATSSDetector, build_detector
from .head import ATSS_HEAD_REGISTRY, ATSSHead
from .layers import DeformConv2d, PackedDeformConv2d, swap_deform_convs
from .losses import ClassLoss, DenseLoss, FocalLoss, QualityFocalLoss
from .postprocessing import DetectionSelector, ProposalSelector
from .predictions import DensePredictions, PredictionsAt
from .proposal_generator import ATSS

__version__ = "0.2.0"

defer_toy_shapes()

__all__ = [
    "ASSIGNER_REGISTRY",
    "ATSS",
    "ATSS_HEAD_REGISTRY",
    "ATSSAssigner",
    "ATSSDetector",
    "ATSSHead",
    "AnchorGrid",
    "Assigner",
    "Assignment",
    "BOX2BOX_TRANSFORM_REGISTRY",
    "Box2BoxTransform",
    "CLASS_LOSS_REGISTRY",
    "ClassLoss",
    "DeformConv2d",
    "DenseLoss",
    "DensePredictions",
    "DetectionSelector",
    "FocalLoss",
    "GridAnchorGenerator",
    "IoUAssigner",
    "LOSS_REGISTRY",
    "PackedDeformConv2d",
    "PointToBoxTransform",
    "PredictionAssigner",
    "PredictionsAt",
    "ProposalSelector",
    "QualityFocalLoss",
    "SSCAssigner",
    "SimOTAAssigner",
    "TopKAssigner",
    "add_atss_config",
    "build_atss_resnet_fpn_backbone",
    "build_detector",
    "octave_sizes",
    "resnet_fpn",
    "swap_deform_convs",
]
