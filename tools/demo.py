#!/usr/bin/env python
"""Train ATSS on the embedded shapes and show what it learned, in minutes on two CPU cores.

    python tools/demo.py                     # output/demo: checkpoint, metrics.json, pictures
    python tools/demo.py --quick             # the same in about a minute, as a short test
    python tools/demo.py model.assigner.topk=15 --output output/k15

Every key=value overrides the config.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Dict, List

import _quiet  # noqa: F401
import cv2
import torch
from atss.checkpoint import ATSSCheckpointer
from atss.data import register_toy_shapes
from atss.model_zoo import config_file
from atss.training import (
    build_model,
    load_lazy_config,
    run_here,
    set_up_run,
    tool_parser,
    train_lazy,
)
from atss.visualization import draw_assignment, draw_detections, plot_training, tile

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Boxes

QUICK = ["train.max_iter=60", "train.eval_period=60", "train.checkpointer.period=60"]


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("--output", default="output/demo", metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="60 iterations only")
    parser.add_argument("opts", nargs="*", help="config overrides, key=value")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    output = Path(args.output)
    overrides = [*(QUICK if args.quick else []), f"train.output_dir={output}", *args.opts]
    cfg = load_lazy_config(config_file("toy/atss_toy"), overrides)
    _, val_name = register_toy_shapes()
    output.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", "last_checkpoint"):
        (output / name).unlink(missing_ok=True)  # Detectron2 would continue those of an earlier run
    set_up_run(cfg, argparse.Namespace(config_file="", eval_only=False, opts=overrides))

    results = train_lazy(cfg)
    trained = time.perf_counter() - start
    model = build_model(cfg).eval()
    ATSSCheckpointer(model).load(str(output / "model_final.pth"))

    images = DatasetCatalog.get(val_name)
    class_names = MetadataCatalog.get(val_name).thing_classes
    cv2.imwrite(str(output / "detections.png"), detection_sheet(model, images[:12], class_names))
    cv2.imwrite(str(output / "positives.png"), assignment_picture(model, images))
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    plot_training(records, str(output / "curves.png"), "ATSS on the embedded shapes")

    ap = results["bbox"]
    print(
        f"\nTrained {cfg.train.max_iter} iterations in {trained:.0f} s (with data and evaluation): "
        f"AP {ap['AP']:.1f}, AP50 {ap['AP50']:.1f}, APs {ap['APs']:.1f}, APm {ap['APm']:.1f}, "
        f"APl {ap['APl']:.1f} on {len(images)} val images.\n\n"
        f"In {output}:\n"
        "  detections.png   val images, ground truth left and detections right\n"
        "  positives.png    which anchors are positive for the objects of one image, per level\n"
        "  curves.png       losses and AP over the iterations\n"
        "  metrics.json     all figures, one line per record\n"
        "  model_final.pth  the checkpoint\n\n"
        "Try next:\n"
        "  another k:          python tools/demo.py model.assigner.topk=3 --output output/k3\n"
        "  your images:        python tools/lazyconfig_train_net.py --config-file "
        "configs/toy/atss_toy.py \\\n"
        "                          --train-json train.json --train-images train/ "
        "--val-json val.json --val-images val/"
    )


@torch.no_grad()
def detection_sheet(model, images: List[Dict[str, Any]], class_names: List[str]):
    """Images with ground truth and detections, three in a row."""
    pictures = []
    for record in images:
        image, truth = load(record)
        inputs = {"image": torch.as_tensor(image.transpose(2, 0, 1).copy())}
        found = model([inputs])[0]["instances"].to("cpu")
        pictures.append(
            draw_detections(
                image,
                truth.gt_boxes.tensor,
                truth.gt_classes.tolist(),
                found.pred_boxes.tensor,
                found.pred_classes.tolist(),
                found.scores.tolist(),
                class_names,
            )
        )
    return tile(pictures, columns=3)


def assignment_picture(model, images: List[Dict[str, Any]], zoom: int = 2):
    """Positives of the image whose objects differ most in size, enlarged."""

    def spread(record):
        sizes = load(record)[1].gt_boxes.area().sqrt()
        return float(sizes.max() / sizes.min()) if 3 <= len(sizes) <= 5 else 0.0

    image, truth = load(max(images, key=spread))
    core = model.proposal_generator
    height, width = image.shape[:2]
    features = [
        torch.empty(1, 1, -(-height // stride), -(-width // stride), device=model.device)
        for stride in core.anchor_generator.strides
    ]
    anchors = core.anchor_generator.grid(features)
    assignment = core.assigner(anchors, [truth.gt_boxes.to(model.device)])
    return draw_assignment(
        cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC),
        [Boxes(level.tensor * zoom) for level in anchors.boxes],
        assignment,
        Boxes(truth.gt_boxes.tensor * zoom),
        level_names=core.in_features,
    )


def load(record: Dict[str, Any]):
    """The image of a Detectron2 dataset dict, (H, W, 3) uint8 BGR, and its ground truth."""
    image = cv2.imread(record["file_name"])
    return image, annotations_to_instances(record["annotations"], image.shape[:2])


if __name__ == "__main__":
    run_here(main, parse_arguments())
