"""ATSS for Detectron2: importing it registers its models, parts and backbones.

"Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
Selection" (arXiv:1912.02424).
"""

from .anchors import AnchorGrid, GridAnchorGenerator, octave_sizes
from .assigners import Assignment, ATSSAssigner, IoUAssigner, SSCAssigner, TopKAssigner
from .backbone import build_atss_resnet_fpn_backbone, resnet_fpn
from .box_regression import Box2BoxTransform, PointToBoxTransform
from .config import add_atss_config
from .detector import ATSSDetector, build_detector
from .head import ATSS_HEAD_REGISTRY, ATSSHead
from .layers import DeformConv2d, PackedDeformConv2d, swap_deform_convs
from .losses.dense import DenseLoss
from .postprocessing.proposals import ProposalSelector
from .proposal_generator import ATSS

__version__ = "0.1.0"

__all__ = [
    "ATSS",
    "ATSS_HEAD_REGISTRY",
    "ATSSAssigner",
    "ATSSDetector",
    "ATSSHead",
    "AnchorGrid",
    "Assignment",
    "Box2BoxTransform",
    "DeformConv2d",
    "DenseLoss",
    "GridAnchorGenerator",
    "IoUAssigner",
    "PackedDeformConv2d",
    "PointToBoxTransform",
    "ProposalSelector",
    "SSCAssigner",
    "TopKAssigner",
    "add_atss_config",
    "build_atss_resnet_fpn_backbone",
    "build_detector",
    "octave_sizes",
    "resnet_fpn",
    "swap_deform_convs",
]
