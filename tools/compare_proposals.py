#!/usr/bin/env python
"""Compare ATSS with Detectron2's RPN as first stage of the same Faster R-CNN.

Both are trained on the embedded shapes from the same seed, with the same backbone, second stage,
numbers of proposals, schedule and images. Prints recall of the proposals (AR over IoU 0.5 to 0.95,
100 and 1000 per image) and AP of the detector, and writes the table.

    python tools/compare_proposals.py --iterations 200 --batch-size 8
"""

import argparse
import os
import time

from atss.checkpoint import ATSSCheckpointer
from atss.data import register_toy_shapes
from atss.model_zoo import get_config
from atss.training import build_model, train_lazy

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import ProposalNetwork
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

METRICS = ("AR@100", "AR@1000", "AP", "AP50", "AP75")


def with_rpn(cfg):
    """Put Detectron2's RPN, as its own FPN configs have it, in the place of ATSS."""
    selector = cfg.model.proposal_generator.proposal_selector
    cfg.model.proposal_generator = L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels="${...backbone.out_channels}", num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=list(selector.pre_nms_topk),
        post_nms_topk=list(selector.post_nms_topk),
        nms_thresh=selector.nms_thresh,
    )
    return cfg


def proposal_recall(cfg, model):
    """AR@100 and AR@1000 of the first stage on the test set, in percent."""
    first_stage = ProposalNetwork(
        backbone=model.backbone,
        proposal_generator=model.proposal_generator,
        pixel_mean=list(cfg.model.pixel_mean),
        pixel_std=list(cfg.model.pixel_std),
    ).to(model.device)
    evaluator = COCOEvaluator(cfg.dataloader.test.dataset.names[0])
    results = inference_on_dataset(first_stage, instantiate(cfg.dataloader.test), evaluator)
    return results["box_proposals"]


def measure(name, cfg, args):
    """Train one model; its recall, its AP, and the minutes of training and the evaluation of AP."""
    cfg.dataloader.train.total_batch_size = args.batch_size
    cfg.train.max_iter = args.iterations
    cfg.train.eval_period = 0
    cfg.train.seed = args.seed
    cfg.train.amp.enabled = False  # rounding should favour neither
    cfg.train.output_dir = os.path.join(args.output_dir, name)
    os.makedirs(cfg.train.output_dir, exist_ok=True)
    seed_all_rng(args.seed)
    start = time.perf_counter()
    results = train_lazy(cfg)["bbox"]  # evaluates once, at the end
    minutes = (time.perf_counter() - start) / 60
    model = build_model(cfg)
    ATSSCheckpointer(model).load(os.path.join(cfg.train.output_dir, "model_final.pth"))
    model.eval()
    results = {**proposal_recall(cfg, model), **results}
    return {metric: results[metric] for metric in METRICS}, minutes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output-dir", default="output/compare_proposals")
    args = parser.parse_args()
    setup_logger(name="fvcore")
    setup_logger()
    setup_logger(name="atss")
    register_toy_shapes()
    rows = [
        f"| first stage | {' | '.join(METRICS)} | minutes |",
        f"|---|{'---:|' * (len(METRICS) + 1)}",
    ]
    for name, cfg in (
        ("RPN", with_rpn(get_config("toy/faster_rcnn_atss_toy"))),
        ("ATSS", get_config("toy/faster_rcnn_atss_toy")),
    ):
        values, minutes = measure(name, cfg, args)
        rows.append(
            f"| {name} | {' | '.join(f'{v:.1f}' for v in values.values())} | {minutes:.1f} |"
        )
    table = "\n".join(rows)
    print(table)
    with open(os.path.join(args.output_dir, "table.md"), "w") as file:
        file.write(
            f"{args.iterations} iterations of {args.batch_size} images, seed {args.seed}\n\n"
        )
        file.write(f"{table}\n")


if __name__ == "__main__":
    main()
