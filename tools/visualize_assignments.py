#!/usr/bin/env python
"""Draw which anchors are positive for the objects of an image, under each rule of the paper.

    python tools/visualize_assignments.py                       # an embedded image, all rules
    python tools/visualize_assignments.py --rules atss iou --topk 15
    python tools/visualize_assignments.py --json val.json --images val/ --index 3

Writes one picture: a row per rule, a panel per pyramid level.
"""

import argparse
import os
import sys

import _quiet  # noqa: F401
import cv2
import torch
from atss.anchors import GridAnchorGenerator, octave_sizes
from atss.assigners import ATSSAssigner, IoUAssigner, SSCAssigner, TopKAssigner
from atss.data import ToyShapesOptions, register_coco_json, register_toy_shapes
from atss.visualization import draw_assignment, tile, with_title

from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes

STRIDES = (8, 16, 32, 64, 128)
MAX_SIDE = 640  # pixels of a panel


def rules(topk: int):
    """The assigners of Table 3 and their names."""
    return {
        "iou": ("IoU (RetinaNet)", IoUAssigner()),
        "ssc": ("spatial and scale constraint (FCOS)", SSCAssigner()),
        "center": ("FCOS with center sampling", SSCAssigner(center_sampling_radius=1.5)),
        "topk": (f"top {topk} of all levels", TopKAssigner(topk=topk)),
        "atss": (f"ATSS, k = {topk}", ATSSAssigner(topk=topk)),
    }


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rules", nargs="+", choices=list(rules(9)), default=list(rules(9)))
    parser.add_argument("--topk", type=int, default=9, help="k of ATSS and top-k")
    parser.add_argument("--levels", type=int, default=4, help="panels to draw, from P3")
    parser.add_argument("--json", metavar="FILE", help="your COCO annotations (default: toy set)")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the images of --json")
    parser.add_argument("--index", type=int, default=None, help="which image of the set, from 0")
    parser.add_argument(
        "--zoom",
        type=float,
        help=f"size of a panel, 0.5 is half; by default 1, less for images above {MAX_SIDE} px",
    )
    parser.add_argument("--output", default="output/assignments.png", metavar="FILE")
    return parser.parse_args(arguments)


def load_record(args: argparse.Namespace):
    """Detectron2 dataset dict of the image to draw."""
    if bool(args.json) != bool(args.images):
        raise ValueError("--json and --images need each other.")
    if args.json:
        register_coco_json("to_draw", args.json, args.images)
        name, index = "to_draw", args.index or 0
    else:
        # Larger than the training images, so that more levels have positives.
        options = ToyShapesOptions(
            image_size=512, max_size=360, num_train=1, num_val=30, max_objects=6
        )
        _, name = register_toy_shapes(options=options, name="toy_shapes_large")
        index = 14 if args.index is None else args.index
    records = DatasetCatalog.get(name)
    if not 0 <= index < len(records):
        raise ValueError(f"--index must be in 0..{len(records) - 1}, got {index}.")
    return records[index]


def draw(args: argparse.Namespace):
    """The picture, (H, W, 3) uint8 BGR."""
    record = load_record(args)
    image = cv2.imread(record["file_name"])
    boxes = torch.tensor([a["bbox"] for a in record["annotations"]]).view(-1, 4)
    gt_boxes = Boxes(torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1))
    # Eight strides for all rules: Table 3 compares rules, not anchors.
    generator = GridAnchorGenerator(
        sizes=octave_sizes(STRIDES), aspect_ratios=[1.0], strides=list(STRIDES)
    )
    height, width = image.shape[:2]
    features = [torch.empty(1, 1, -(-height // s), -(-width // s)) for s in STRIDES]
    anchors = generator.grid(features)
    zoom = args.zoom or min(1.0, MAX_SIDE / max(height, width))
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
    # The rule sees all levels; the picture shows the first ones.
    shown = [Boxes(level.tensor * zoom) for level in anchors.boxes[: args.levels]]
    rows = []
    for name in args.rules:
        title, assigner = rules(args.topk)[name]
        assignment = assigner(anchors, [gt_boxes])
        names = [f"P{i + 3}" for i in range(args.levels)]
        row = draw_assignment(
            image, shown, assignment, Boxes(gt_boxes.tensor * zoom), level_names=names
        )
        rows.append(with_title(row, title))
    return tile(rows, columns=1, gap=8)


def main(args: argparse.Namespace) -> None:
    picture = draw(args)
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    cv2.imwrite(args.output, picture)
    print(f"Wrote {args.output}: {', '.join(args.rules)}; a row per rule, a panel per level.")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
