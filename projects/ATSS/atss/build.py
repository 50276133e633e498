"""Parts of a model from a YAML config, by registries. The only file that reads MODEL.ATSS.

Everything ends in the constructors that a LazyConfig names, so both kinds of config build the same
model.
"""

import inspect
from typing import Any, Callable, Dict, Mapping, Tuple

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.utils.registry import Registry

from .assigners import ATSSAssigner, IoUAssigner, SimOTAAssigner, SSCAssigner, TopKAssigner
from .box_regression import Box2BoxTransform, PointToBoxTransform
from .head import ATSS_HEAD_REGISTRY
from .losses import DenseLoss, FocalLoss, QualityFocalLoss
from .postprocessing import DetectionSelector, ProposalSelector


def _registry(name: str, doc: str, *parts: type) -> Registry:
    registry = Registry(name)
    registry.__doc__ = f"{doc} Register your own to use it from YAML; a LazyConfig names the class."
    for part in parts:
        registry.register(part)
    return registry


ASSIGNER_REGISTRY = _registry(
    "ATSS_ASSIGNER",
    "Rules of axis 1, `Assigner` or `PredictionAssigner`, by MODEL.ATSS.ASSIGNER.NAME.",
    ATSSAssigner,
    IoUAssigner,
    SSCAssigner,
    SimOTAAssigner,
    TopKAssigner,
)
BOX2BOX_TRANSFORM_REGISTRY = _registry(
    "ATSS_BOX2BOX_TRANSFORM",
    "Transforms of axis 2, `get_deltas` and `apply_deltas`, by MODEL.ATSS.BOX2BOX_TRANSFORM.NAME.",
    Box2BoxTransform,
    PointToBoxTransform,
)
LOSS_REGISTRY = _registry(
    "ATSS_LOSS",
    "Losses, `(predictions, anchors, targets) -> dict`, by MODEL.ATSS.LOSS.NAME.",
    DenseLoss,
)
CLASS_LOSS_REGISTRY = _registry(
    "ATSS_CLASS_LOSS",
    "Class losses, `ClassLoss`, by MODEL.ATSS.LOSS.CLASSIFICATION.NAME.",
    FocalLoss,
    QualityFocalLoss,
)


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
    box2box_transform = build_part(BOX2BOX_TRANSFORM_REGISTRY, cfg, "MODEL.ATSS.BOX2BOX_TRANSFORM")
    head = build_part(
        ATSS_HEAD_REGISTRY,
        cfg,
        "MODEL.ATSS.HEAD",
        in_channels=shapes[0].channels,
        num_classes=num_classes,
        num_anchors=anchor_generator.num_anchors[0],
        num_levels=len(shapes),
        bbox_bias=4.0 if isinstance(box2box_transform, PointToBoxTransform) else 0.0,
    )
    loss = build_part(
        LOSS_REGISTRY,
        cfg,
        "MODEL.ATSS.LOSS",
        box2box_transform=box2box_transform,
        num_classes=num_classes,
        classification=build_part(CLASS_LOSS_REGISTRY, cfg, "MODEL.ATSS.LOSS.CLASSIFICATION"),
    )
    return {
        "head": head,
        "anchor_generator": anchor_generator,
        "assigner": build_part(ASSIGNER_REGISTRY, cfg, "MODEL.ATSS.ASSIGNER"),
        "box2box_transform": box2box_transform,
        "loss": loss,
        "num_classes": num_classes,
        "selector": _proposal_selector(cfg) if as_proposals else _detection_selector(cfg),
        "in_features": tuple(atss.IN_FEATURES),
        "box_offset": atss.BOX_OFFSET,
        "stats_period": atss.STATS_PERIOD,
    }


def _detection_selector(cfg) -> DetectionSelector:
    atss = cfg.MODEL.ATSS
    return DetectionSelector(
        score_thresh=atss.SCORE_THRESH,
        topk_candidates=atss.TOPK_CANDIDATES,
        nms_thresh=atss.NMS_THRESH,
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        sqrt_score=atss.SQRT_SCORE,
    )


def _proposal_selector(cfg) -> ProposalSelector:
    rpn = cfg.MODEL.RPN
    return ProposalSelector(
        pre_nms_topk=(rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
        post_nms_topk=(rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
        nms_thresh=rpn.NMS_THRESH,
        min_box_size=cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
        sqrt_score=cfg.MODEL.ATSS.SQRT_SCORE,
    )


def build_part(registry: Registry, cfg, path: str, **defaults) -> Any:
    """The part that a node of the config names, with the node's keys as arguments.

    Keys that are None are left at the default of the part, "none" is Python's None, and nodes below
    are parts of their own.

    Args:
        registry: of the classes that NAME can name.
        cfg: config with `add_atss_config`'s keys.
        path: of the node, "MODEL.ATSS.ASSIGNER".
        **defaults: arguments that the model decides; those that the class does not take are left
            out, and keys of the node win over them.

    Raises:
        ValueError: for an unknown name (listing the known ones) or a key that it does not take.
    """
    node = cfg
    for key in path.split("."):
        node = node[key]
    known = [name for name, _ in registry]
    if node.NAME not in known:
        raise ValueError(f"Unknown {path}.NAME {node.NAME!r}; known are {known}.")
    part = registry.get(node.NAME)
    arguments = {
        key.lower(): None if isinstance(value, str) and value == "none" else value
        for key, value in node.items()
        if key != "NAME" and value is not None and not isinstance(value, Mapping)
    }
    accepted, takes_any = accepted_arguments(part)
    unknown = [] if takes_any else [key.upper() for key in arguments if key not in accepted]
    if unknown:
        raise ValueError(
            f"{path} sets {unknown}, which {node.NAME} does not take; it takes "
            f"{[name.upper() for name in accepted]}."
        )
    given = {key: value for key, value in defaults.items() if takes_any or key in accepted}
    return part(**{**given, **arguments})


def accepted_arguments(part: Callable) -> Tuple[Tuple[str, ...], bool]:
    """Names of the arguments of a class or function; whether it takes any others (`**kwargs`)."""
    parameters = inspect.signature(part).parameters.values()
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD), takes_any
