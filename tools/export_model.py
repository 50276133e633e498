#!/usr/bin/env python3
"""Export of a trained detector to a file that is compared with the model, with metadata as JSON.

    python tools/export_model.py --config-file configs/toy/atss_toy.py \\
        --weights output/demo/model_final.pth --format onnx --output output/atss.onnx
    python tools/export_model.py --zoo atss_R_50_FPN_1x --format torchscript --output output/r50.pt

The metadata is called after the file: atss.onnx.json. docs/deploy.md shows how to use both.
Exits with 1 if the file's detections differ from the model's, naming the first stage that does.
"""

import argparse
import functools
import os
import sys
import time
import warnings
from pathlib import Path
from typing import List, Optional, Tuple

import _quiet  # noqa: F401
import cv2
import torch
from atss.checkpoint import ATSSCheckpointer, load_or_resume
from atss.detector import ATSSDetector
from atss.export import (
    DEFAULT_OPSET,
    FORMATS,
    class_names_of,
    collect_metadata,
    compare_with_eager,
    first_stage_that_differs,
    format_table,
    resize_rule,
    sizes_to_compare,
    spread_scores,
    write_metadata,
)
from atss.model_zoo import config_file, get_checkpoint_url
from atss.training import find_config, import_modules, load_config, tool_parser
from torch import nn

from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model

# Errors that a user can cause and fix: the message is enough. Others show their trace.
USER_ERRORS = (ImportError, NotImplementedError, OSError, TypeError, ValueError)


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config-file", metavar="FILE", help="LazyConfig (.py), YAML config, or folder of a run"
    )
    source.add_argument("--zoo", metavar="NAME", help="config by name, such as atss_R_50_FPN_1x")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint, URL or folder of a run; default with --zoo: the published one",
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="to try whether a model can be exported"
    )
    parser.add_argument("--format", required=True, choices=sorted(FORMATS))
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="file to write, .pt, .pt2 or .onnx"
    )
    parser.add_argument(
        "--raw-heads",
        action="store_true",
        help="logits, boxes and centerness of all anchors, without NMS, for images of --size",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images in a batch, fixed")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(256, 320),
        metavar=("HEIGHT", "WIDTH"),
        help="of the example image; the file takes any size, except with --raw-heads",
    )
    parser.add_argument(
        "--opset", type=int, default=DEFAULT_OPSET, help="version of ONNX operators"
    )
    parser.add_argument(
        "--class-names", metavar="A,B,...", help="for the metadata, if the data set is not known"
    )
    parser.add_argument(
        "--check-image", metavar="FILE", help="image to compare on; synthetic ones by default"
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config overrides: key=value for a LazyConfig, KEY VALUE pairs for YAML",
    )
    return parser.parse_args(argv)


def export(args: argparse.Namespace) -> bool:
    """Export as the arguments say; returns whether the file passed its check.

    Raises:
        USER_ERRORS: where that is impossible; the output is then left as it was.
    """
    check_arguments(args)
    import_modules(args.modules)
    image = None if args.check_image is None else read_image(args.check_image)
    cfg, model, class_names = build(args)
    size = tuple(args.size)
    stage = "raw heads" if args.raw_heads else "detections"
    options = dict(batch_size=args.batch_size, example_size=size)
    if args.format != "torchscript":
        options["dynamic"] = not args.raw_heads
    if args.format == "onnx":
        options["opset"] = args.opset
    is_fixed = not options.get("dynamic", True)
    if args.class_names:
        class_names = args.class_names.split(",")
    metadata = collect_metadata(
        model,
        args.output,
        args.format,
        args.batch_size,
        stage,
        fixed_size=size if is_fixed else None,
        resize=resize_rule(cfg),
        class_names=class_names,
        opset=options.get("opset"),
    )
    if image is not None and model.input_format == "RGB":
        image = image.flip(0)
    sizes = [size] * 4 if is_fixed else sizes_to_compare(size)
    write = functools.partial(FORMATS[args.format].export, model, **options)
    compare = functools.partial(
        compare_with_eager, model, sizes=sizes, batch_size=args.batch_size, image=image
    )
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.stem}.partial{output.suffix}")
    try:
        start = time.perf_counter()
        write(partial, stage=stage)
        seconds = time.perf_counter() - start
        rows = compare(FORMATS[args.format].load(partial), stage=stage)
        print(format_table(rows))
        if not all(row.passed for row in rows):
            print("The file differs from the model and was not kept.")
            if isinstance(model, ATSSDetector):
                print("Exporting up to earlier stages, to find where it goes wrong ...")
                first = first_stage_that_differs(write, compare, args.format, stage)
                print(f"First stage that differs: {first}.")
            return False
        os.replace(partial, output)
    finally:
        if partial.exists():
            partial.unlink()
    if not any(row.num_eager for row in rows):
        print(
            "No detections on any test image, so the comparison proves little. Pass a real picture "
            "with --check-image."
        )
    metadata_file = write_metadata(metadata, output)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB in {seconds:.0f} s")
    print(f"{metadata_file}: input, outputs, classes and versions")
    return True


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse mistakes before anything takes time.

    Raises:
        OSError, ValueError: naming the option.
    """
    output = Path(args.output)
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    if output.is_dir() or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PermissionError(f"--output {args.output!r} cannot be written: give a file name.")
    suffix = FORMATS[args.format].suffix
    if output.suffix != suffix:
        raise ValueError(
            f"--output {args.output!r} must end in {suffix!r} for --format {args.format}."
        )
    if args.batch_size < 1 or min(args.size) < 1:
        raise ValueError(
            f"--batch-size and --size must be positive, got {args.batch_size} and {args.size}."
        )
    if args.weights and args.random_weights:
        raise ValueError("--weights and --random-weights are mutually exclusive.")
    if not args.weights and not args.random_weights and not args.zoo:
        raise ValueError("Give the trained --weights, or --random-weights to try the export.")


def build(args: argparse.Namespace) -> Tuple[object, nn.Module, Optional[List[str]]]:
    """The config and its model, with weights, on the CPU, in evaluation mode; class names if known.

    Weights that do not name their classes are not given the names of the config's data set, which
    need not be theirs; only published ones are.
    """
    file = config_file(args.zoo) if args.zoo else find_config(args.config_file)
    weights = args.weights
    if weights is None and not args.random_weights:
        weights = get_checkpoint_url(args.zoo)
    cfg = load_config(file, args.opts)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
    else:
        model = instantiate(cfg.model)
    class_names = None
    if weights:
        class_names = load_or_resume(ATSSCheckpointer(model), weights, resume=False).class_names
    else:
        spread_scores(model)
    if not args.weights:
        final = getattr(model, "roi_heads", model.proposal_generator)
        class_names = class_names_of(cfg, int(final.num_classes))
    elif class_names is None and not args.class_names:
        print("These weights do not name their classes: give --class-names, or the JSON has none.")
    return cfg, model.eval(), class_names


def read_image(file: str) -> torch.Tensor:
    """(3, H, W) BGR."""
    image = cv2.imread(file)
    if image is None:
        raise FileNotFoundError(f"--check-image {file!r} is not an image that can be read.")
    return torch.as_tensor(image.transpose(2, 0, 1).copy())


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    # PyTorch warns of TorchScript's deprecation at every step.
    warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
    try:
        return 0 if export(args) else 1
    except USER_ERRORS as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
