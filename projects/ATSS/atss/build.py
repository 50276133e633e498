"""How does a YAML config become parts? The only file that reads MODEL.ATSS.

Everything ends in the constructors that a LazyConfig names, so both kinds of config build the same
model.
"""

import inspect
from typing import Any, Callable, Dict, Mapping

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.utils.registry import Registry

from .assigners import ATSSAssigner, IoUAssigner, SSCAssigner, TopKAssigner
from .box_regression import Box2BoxTransform, PointToBoxTransform
from .head import ATSS_HEAD_REGISTRY
from .losses.dense import DenseLoss
from .postprocessing.proposals import ProposalSelector

__all__ = [
    "ASSIGNER_REGISTRY",
    "BOX2BOX_TRANSFORM_REGISTRY",
    "build_assigner",
    "build_box2box_transform",
    "build_parts",
]

ASSIGNER_REGISTRY = Registry("ATSS_ASSIGNER")
ASSIGNER_REGISTRY.__doc__ = """
Rules of axis 1, `(anchors, gt_boxes) -> Assignment`, by the name in MODEL.ATSS.ASSIGNER.NAME.
Register your own to use it from YAML; a LazyConfig just names the class.
"""
for _assigner in (ATSSAssigner, IoUAssigner, SSCAssigner, TopKAssigner):
    ASSIGNER_REGISTRY.register(_assigner)

BOX2BOX_TRANSFORM_REGISTRY = Registry("ATSS_BOX2BOX_TRANSFORM")
BOX2BOX_TRANSFORM_REGISTRY.__doc__ = "Transforms of axis 2, `get_deltas` and `apply_deltas`."
for _transform in (Box2BoxTransform, PointToBoxTransform):
    BOX2BOX_TRANSFORM_REGISTRY.register(_transform)


def build_assigner(cfg) -> Callable:
    """The assigner that MODEL.ATSS.ASSIGNER describes.

    Args:
        cfg: config with `add_atss_config`'s keys.

    Raises:
        ValueError: for an unknown name (listing the known ones) or a key that it does not take.
    """
    return _build(ASSIGNER_REGISTRY, cfg.MODEL.ATSS.ASSIGNER, "MODEL.ATSS.ASSIGNER")


def build_box2box_transform(cfg):
    """The box transform that MODEL.ATSS.BOX2BOX_TRANSFORM describes.

    Args:
        cfg: config with `add_atss_config`'s keys.

    Raises:
        ValueError: for an unknown name (listing the known ones) or a key that it does not take.
    """
    node = cfg.MODEL.ATSS.BOX2BOX_TRANSFORM
    return _build(BOX2BOX_TRANSFORM_REGISTRY, node, "MODEL.ATSS.BOX2BOX_TRANSFORM")


def build_parts(
    cfg, input_shape: Dict[str, ShapeSpec], as_proposals: bool = False
) -> Dict[str, Any]:
    """Constructor arguments of `ATSS`.

    Args:
        cfg: config with `add_atss_config`'s keys.
        input_shape: channels and stride of each feature map by name.
        as_proposals: the parts of a first stage: one class, and the counts and the NMS threshold of
            MODEL.RPN and MODEL.PROPOSAL_GENERATOR, which mean the same there.

    Returns:
        Keyword arguments.

    Raises:
        ValueError: where the config names something that does not exist, listing what does.
    """
    atss = cfg.MODEL.ATSS
    missing = [name for name in atss.IN_FEATURES if name not in input_shape]
    if missing:
        raise ValueError(
            f"MODEL.ATSS.IN_FEATURES names {missing}, but the backbone gives {list(input_shape)}."
        )
    num_classes = 1 if as_proposals else atss.NUM_CLASSES
    shapes = [input_shape[name] for name in atss.IN_FEATURES]
    anchor_generator = build_anchor_generator(cfg, shapes)
    box2box_transform = build_box2box_transform(cfg)
    bbox_bias = 4.0 if isinstance(box2box_transform, PointToBoxTransform) else 0.0
    head = _build(
        ATSS_HEAD_REGISTRY,
        atss.HEAD,
        "MODEL.ATSS.HEAD",
        {
            "in_channels": shapes[0].channels,
            "num_classes": num_classes,
            "num_anchors": anchor_generator.num_anchors[0],
            "num_levels": len(shapes),
            "bbox_bias": bbox_bias,
        },
    )
    loss = DenseLoss(
        box2box_transform=box2box_transform,
        num_classes=num_classes,
        centerness=atss.HEAD.CENTERNESS,
        **_arguments(atss.LOSS),
    )
    return {
        "head": head,
        "anchor_generator": anchor_generator,
        "assigner": build_assigner(cfg),
        "box2box_transform": box2box_transform,
        "loss": loss,
        "num_classes": num_classes,
        "in_features": tuple(atss.IN_FEATURES),
        "score_thresh": atss.SCORE_THRESH,
        "topk_candidates": atss.TOPK_CANDIDATES,
        "nms_thresh": atss.NMS_THRESH,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "sqrt_score": atss.SQRT_SCORE,
        "box_offset": atss.BOX_OFFSET,
        "stats_period": atss.STATS_PERIOD,
        "proposal_selector": _build_proposal_selector(cfg) if as_proposals else None,
    }


def _build_proposal_selector(cfg) -> ProposalSelector:
    rpn = cfg.MODEL.RPN
    return ProposalSelector(
        pre_nms_topk=(rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
        post_nms_topk=(rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
        nms_thresh=rpn.NMS_THRESH,
        min_box_size=cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
    )


def _arguments(node: Mapping[str, Any]) -> Dict[str, Any]:
    return {
        key.lower(): value for key, value in node.items() if key != "NAME" and value is not None
    }


def _build(registry: Registry, node, path: str, defaults: Mapping[str, Any] = {}):
    """Instantiate what a node names; its keys that are not None are keyword arguments."""
    known = [name for name, _ in registry]
    if node.NAME not in known:
        raise ValueError(f"Unknown {path}.NAME {node.NAME!r}; known are {known}.")
    cls = registry.get(node.NAME)
    arguments = _arguments(node)
    accepted = list(inspect.signature(cls.__init__).parameters)[1:]
    unknown = [key.upper() for key in arguments if key not in accepted]
    if unknown:
        raise ValueError(
            f"{path} sets {unknown}, which {node.NAME} does not take; it takes "
            f"{[name.upper() for name in accepted]}."
        )
    return cls(**{**defaults, **arguments})
