"""Keys of a YAML config: MODEL.ATSS, and the recipe keys of the paper.

Keys are the constructor arguments in capitals. In nodes with a NAME, None means the default of the
named class; a file may set further keys of a class of your own there, and a key that the class does
not take is refused when the model is built.
"""

from detectron2.config import CfgNode as CN


def add_atss_config(cfg: CN) -> None:
    """Add MODEL.ATSS and the recipe keys of the paper to Detectron2's config.

    Args:
        cfg: as `detectron2.config.get_cfg()` returns it; changed in place, as Detectron2's projects
            do.
    """
    atss = cfg.MODEL.ATSS = CN()
    atss.NUM_CLASSES = 80
    atss.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    atss.RELU_BEFORE_P7 = True
    atss.FROZEN_BN_EPS = 1e-5

    # Axis 1 of 4: which anchors are positive.
    atss.ASSIGNER = CN(new_allowed=True)
    atss.ASSIGNER.NAME = "ATSSAssigner"
    for key in (
        "TOPK",
        "CENTER_MARGIN",
        "CENTER_IN_GT",
        "MIN_POSITIVES_PER_GT",
        "THRESHOLDS",
        "ALLOW_LOW_QUALITY_MATCHES",
        "SIZE_RANGES",
        "CENTER_SAMPLING_RADIUS",
        "STRIDES",
        "BUDGET",
    ):
        atss.ASSIGNER[key] = None

    # Axis 2 of 4: where regression starts, a box or a point.
    atss.BOX2BOX_TRANSFORM = CN(new_allowed=True)
    atss.BOX2BOX_TRANSFORM.NAME = "Box2BoxTransform"
    atss.BOX2BOX_TRANSFORM.WEIGHTS = None  # (10, 10, 5, 5) for boxes
    atss.BOX2BOX_TRANSFORM.ANCHOR_SCALE = None

    # Axis 3 of 4: head and losses.
    atss.HEAD = CN(new_allowed=True)
    atss.HEAD.NAME = "ATSSHead"
    for key in ("NUM_CONVS", "NORM", "CENTERNESS", "LEVEL_SCALES", "DEFORMABLE", "CONV_BIAS",
                "PRIOR_PROB", "BBOX_BIAS"):  # fmt: skip
        atss.HEAD[key] = None  # BBOX_BIAS: 0 for boxes, 4 for points

    atss.LOSS = CN(new_allowed=True)
    atss.LOSS.NAME = "DenseLoss"
    atss.LOSS.CLASSIFICATION = CN(new_allowed=True)
    atss.LOSS.CLASSIFICATION.NAME = "FocalLoss"
    for key in ("ALPHA", "GAMMA", "BETA"):
        atss.LOSS.CLASSIFICATION[key] = None
    # Python's None, "no such thing", is "none" here: a key that is None means the default.
    for key in ("BOX_LOSS", "BOX_LOSS_WEIGHT", "QUALITY", "BOX_WEIGHTING", "CLASS_NORMALIZER",
                "SMOOTH_L1_BETA"):  # fmt: skip
        atss.LOSS[key] = None

    # Axis 4 of 4, anchors per location, is Detectron2's MODEL.ANCHOR_GENERATOR.

    atss.SCORE_THRESH = 0.05
    atss.TOPK_CANDIDATES = 1000
    atss.NMS_THRESH = 0.6
    atss.SQRT_SCORE = True
    atss.BOX_OFFSET = 0.0
    atss.STATS_PERIOD = 0

    # Test-time augmentation, `ATSSWithTTA`; ENABLED, MAX_SIZE and FLIP are Detectron2's. With the
    # scales as they are here come the release's size ranges and long edges, all of it scaled by
    # INPUT.MIN_SIZE_TEST / 800; other scales have no ranges.
    cfg.TEST.AUG.MIN_SIZES = (800, 400, 500, 600, 640, 700, 900, 1000, 1100, 1200, 1300, 1400, 1800)
    cfg.TEST.AUG.SIZE_RANGES = ()  # (low, high) per scale: sizes of boxes that count, in its pixels
    cfg.TEST.AUG.MERGE = "soft-vote"  # or "vote", "nms"
    cfg.TEST.AUG.VOTE_THRESH = 0.66
    cfg.TEST.AUG.SOFT_SCORE_THRESH = 0.05

    # Of the training samplers; Detectron2 0.5 does not have them yet.
    cfg.DATALOADER.setdefault("REPEAT_SQRT", True)
    cfg.DATALOADER.setdefault("RANDOM_SUBSET_RATIO", 1.0)

    cfg.SOLVER.OPTIMIZER = "SGD"  # or "AdamW"
    cfg.SOLVER.WEIGHT_DECAY_NORM = None  # that of WEIGHT_DECAY
    # "float16" needs a GPU, "bfloat16" works everywhere, "auto" is bfloat16 where it is fast.
    cfg.SOLVER.AMP.PRECISION = "float16"
    # So many steps in a row whose loss is not finite are skipped; 0 stops at the first.
    cfg.SOLVER.MAX_NONFINITE_STEPS = 0
    cfg.SOLVER.CHANNELS_LAST = False
    # Besides SOLVER.CHECKPOINT_PERIOD: how many stay (None: all) next to the best, whether a thread
    # writes them, and whether training is to "stop" or "continue" if one cannot be written.
    cfg.SOLVER.CHECKPOINTER = CN({"MAX_TO_KEEP": 100, "ASYNCHRONOUS": True, "ON_ERROR": "stop"})
    cfg.SOLVER.COMPILE = False  # backbone and head through torch.compile

    # `prepare_for_inference` with --eval-only. PRECISION also "bfloat16", "float16" (GPU), "auto".
    cfg.TEST.PREPARE = CN()
    cfg.TEST.PREPARE.ENABLED = False
    cfg.TEST.PREPARE.CHANNELS_LAST = True
    cfg.TEST.PREPARE.PRECISION = "float32"
    cfg.TEST.PREPARE.COMPILE = False
