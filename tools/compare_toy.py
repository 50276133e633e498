#!/usr/bin/env python
"""Train ATSS and Detectron2's own RetinaNet and FCOS on the embedded shapes for the same time.

Same backbone, pyramid, channels and number of head convolutions, data, batch, optimizer, schedule
shape and precision; each gets the same wall time, so a faster step means more iterations. FCOS
needs Detectron2 0.6 or newer.

    python tools/compare_toy.py --seconds 200 --output output/compare_toy
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from atss.data import register_toy_shapes
from atss.model_zoo import config_file
from atss.training import autocast_dtype, build_model, evaluate_lazy, load_lazy_config
from torch import nn

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.utils.events import EventStorage

STRIDES = (8, 16, 32, 64, 128)


def feature_shapes(channels):
    return [ShapeSpec(channels=channels, stride=stride) for stride in STRIDES]


def retinanet(cfg):
    """Detectron2's RetinaNet as its configs have it: nine anchors, smooth L1 (beta 0)."""
    model = cfg.model
    return L(RetinaNet)(
        backbone=model.backbone,
        head=L(RetinaNetHead)(
            input_shape=L(feature_shapes)(channels=model.backbone.out_channels),
            num_classes=model.num_classes,
            conv_dims=[model.backbone.out_channels] * model.head.num_convs,
            prior_prob=0.01,
            num_anchors=9,
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=list(STRIDES),
            offset=0.0,
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(Matcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        num_classes=model.num_classes,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
    )


def fcos(cfg):
    """Detectron2's FCOS as its configs have it: center sampling 1.5, GroupNorm head."""
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    model = cfg.model
    return L(FCOS)(
        backbone=model.backbone,
        head=L(FCOSHead)(
            input_shape=L(feature_shapes)(channels=model.backbone.out_channels),
            num_classes=model.num_classes,
            conv_dims=[model.backbone.out_channels] * model.head.num_convs,
            norm="GN",
        ),
        num_classes=model.num_classes,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        test_score_thresh=0.2,
        test_nms_thresh=0.6,
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
    )


MODELS = {"ATSS": lambda cfg: cfg.model, "RetinaNet": retinanet, "FCOS": fcos}


class Float32Losses(nn.Module):
    """Mixed precision for models whose losses cannot take bfloat16 on the CPU.

    fvcore's GIoU loss assigns float32 into bfloat16 there; predictions are cast back before the
    losses, which keeps towers and backbone, nearly all of the work, in bfloat16.
    """

    def __init__(self, model, dtype):
        super().__init__()
        self.model = model
        if dtype is not None:
            model.head.register_forward_hook(self._to_float32)

    @staticmethod
    def _to_float32(module, inputs, outputs):
        return tuple([level.float() for level in maps] for maps in outputs)

    def forward(self, batch):
        return self.model(batch)


def train(cfg, seconds, device):
    """Train for a time; the learning rate follows the share of it that is used."""
    model = build_model(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    cfg.optimizer.params.model = None
    base_rates = [group["lr"] for group in optimizer.param_groups]
    multiplier = instantiate(cfg.lr_multiplier)
    dtype = autocast_dtype(cfg.train.amp.enabled, cfg.train.amp.precision, device)
    step_model = model if hasattr(model, "proposal_generator") else Float32Losses(model, dtype)
    model.train()
    iterations, used = 0, 0.0
    with EventStorage(0):
        loader = iter(instantiate(cfg.dataloader.train))
        next(loader)  # starting the workers is not training
        start = time.perf_counter()
        while used < 1:
            for group, rate in zip(optimizer.param_groups, base_rates):
                group["lr"] = rate * multiplier(used)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                losses = step_model(next(loader))
            total = sum(losses.values())
            if not total.isfinite():
                raise FloatingPointError(f"loss {losses} at iteration {iterations}")
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            iterations += 1
            used = (time.perf_counter() - start) / seconds
            if iterations % 100 == 0:
                print(f"  {iterations} iterations, {100 * used:.0f}%", flush=True)
    return model, iterations, time.perf_counter() - start


def main(args):
    register_toy_shapes()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.models:
        print(f"{name}:", flush=True)
        cfg = load_lazy_config(config_file("toy/atss_toy"), args.opts)
        cfg.model = MODELS[name](cfg)
        torch.manual_seed(args.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, iterations, seconds = train(cfg, args.seconds, device)
        model.eval()
        ap = evaluate_lazy(cfg, model)["bbox"]
        rows.append(
            {
                "model": name,
                "seconds": round(seconds, 1),
                "iterations": iterations,
                **{key: round(ap[key], 1) for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
            }
        )
        (output / "results.json").write_text(json.dumps(rows, indent=1))
    keys = list(rows[0])
    print("\n| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join(str(row[key]) for key in keys) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=200, help="training time of each model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default="output/compare_toy", metavar="FOLDER")
    parser.add_argument("opts", nargs="*", help="config overrides, key=value")
    try:
        main(parser.parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
