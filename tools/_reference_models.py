"""Detectron2's own RetinaNet, FCOS and RPN: its configs, with the backbone of an ATSS config.

FCOS came after Detectron2 0.6, so only its main branch has it; `has_fcos` says.
"""

import importlib.util
from typing import Dict, List

from omegaconf import DictConfig
from torch import nn

import detectron2
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config

STRIDES = (8, 16, 32, 64, 128)
NO_FCOS = f"Detectron2 {detectron2.__version__} has no FCOS, only its main branch does"


def has_fcos() -> bool:
    """Whether this Detectron2 has FCOS."""
    return importlib.util.find_spec("detectron2.modeling.meta_arch.fcos") is not None


def retinanet(model: DictConfig) -> DictConfig:
    """RetinaNet: nine anchors, smooth L1 (beta 0).

    Args:
        model: config of the ATSS detector it is compared with, for backbone, classes, channels,
            convolutions of each tower and pixel normalization.
    """
    return _like(model, "retinanet")


def fcos(model: DictConfig) -> DictConfig:
    """FCOS: center sampling 1.5, and GroupNorm as in ATSS's head; arguments as of `retinanet`."""
    return _like(model, "fcos")


def rpn(selector: DictConfig) -> DictConfig:
    """RPN of the FPN configs, to stand at `model.proposal_generator`.

    Args:
        selector: of ATSS in its place, for the numbers of proposals and the threshold of NMS.
    """
    config = get_config("common/models/mask_rcnn_fpn.py").model.proposal_generator
    config.head.in_channels = "${...backbone.out_channels}"
    config.update({key: selector[key] for key in ("pre_nms_topk", "post_nms_topk", "nms_thresh")})
    return config


def _like(model: DictConfig, name: str) -> DictConfig:
    config = get_config(f"common/models/{name}.py").model
    config.update({k: model[k] for k in ("backbone", "num_classes", "pixel_mean", "pixel_std")})
    channels = model.backbone.out_channels
    config.head.input_shape = L(_feature_shapes)(channels=channels)
    config.head.conv_dims = [channels] * model.head.num_convs
    return config


def without_network(detector: DictConfig, **changes) -> nn.Module:
    """A detector for its assignment, losses and post-processing, which need only settings.

    Args:
        detector: `retinanet` or `fcos`.
        **changes: entries of that config to replace.
    """
    detector.update(backbone=L(_FeatureShapes)(), head=L(nn.Identity)(), **changes)
    return instantiate(detector)


class _FeatureShapes(nn.Module):
    """In place of a backbone: knows the shapes of features, computes none."""

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return {f"p{i}": shape for i, shape in enumerate(_feature_shapes(256), start=3)}


def _feature_shapes(channels: int) -> List[ShapeSpec]:
    return [ShapeSpec(channels=channels, stride=stride) for stride in STRIDES]
