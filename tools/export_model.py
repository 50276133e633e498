#!/usr/bin/env python3
"""Export a trained detector, compare the file with the model, describe it in model.json.

    python tools/export_model.py --config-file configs/toy/atss_toy.py \\
        --weights output/demo/model_final.pth --format onnx --output output/atss.onnx
    python tools/export_model.py --zoo atss_R_50_FPN_1x --format torchscript --output r50.pt

docs/deploy.md shows how to use the files. Exits with 1 if the file's detections differ from the
model's.
"""

import argparse
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
from atss.export.check import (
    check_sizes,
    compare_with_eager,
    format_table,
    load_exported,
)
from atss.export.formats import DEFAULT_OPSET, export_onnx, export_program, export_torchscript
from atss.export.metadata import class_names_of, describe, resize_rule, write_metadata
from atss.export.operators import MissingOperatorError
from atss.export.samples import spread_scores
from atss.model_zoo import config_file, get_checkpoint_url
from atss.training import (
    add_import_argument,
    import_modules,
    load_lazy_config,
    load_yaml_config,
)
from torch import nn

from detectron2.config import instantiate
from detectron2.modeling import build_model

SUFFIXES = {"torchscript": ".pt", "export": ".pt2", "onnx": ".onnx"}

# Errors that a user can cause and fix: the message is enough. Others show their trace.
USER_ERRORS = (
    ImportError,
    MissingOperatorError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
)


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config-file", metavar="FILE", help="LazyConfig (.py) or YAML config")
    source.add_argument("--zoo", metavar="NAME", help="config by name, such as atss_R_50_FPN_1x")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint or URL; default with --zoo: the published one",
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="to try whether a model can be exported"
    )
    parser.add_argument("--format", required=True, choices=sorted(SUFFIXES))
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
        "--class-names", metavar="A,B,...", help="for model.json, if the data set is not known"
    )
    parser.add_argument(
        "--check-image", metavar="FILE", help="image to compare on; synthetic ones by default"
    )
    add_import_argument(parser)
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
    cfg, model = build(args)
    size = tuple(args.size)
    class_names = args.class_names.split(",") if args.class_names else None
    description = describe(
        model,
        args.output,
        args.format,
        args.batch_size,
        args.raw_heads,
        size if args.raw_heads and args.format != "torchscript" else None,
        resize_rule(cfg),
        class_names or class_names_of(cfg, num_classes_of(model)),
        args.opset if args.format == "onnx" else None,
    )
    output = Path(args.output)
    partial = output.with_name(f".{output.stem}.partial{output.suffix}")
    try:
        start = time.perf_counter()
        write(model, partial, args)
        seconds = time.perf_counter() - start
        run = load_exported(partial, args.format)
        is_fixed = description["input"]["shape"][2] != "height"
        sizes = [size] * 4 if is_fixed else check_sizes(size)
        if image is not None and model.input_format == "RGB":
            image = image.flip(0)
        rows = compare_with_eager(model, run, sizes, args.batch_size, args.raw_heads, image)
        print(format_table(rows))
        if not all(row.passed for row in rows):
            print("The file differs from the model and was not kept.")
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
    description_file = write_metadata(description, output)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB in {seconds:.0f} s")
    print(f"{description_file}: input, outputs, classes and versions")
    return True


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse mistakes before anything takes time.

    Raises:
        OSError, ValueError: naming the option.
    """
    output = Path(args.output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(output.parent)!r} to write --output to.")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise PermissionError(f"--output {args.output!r} cannot be written: give a file name.")
    if output.suffix != SUFFIXES[args.format]:
        raise ValueError(
            f"--output {args.output!r} must end in {SUFFIXES[args.format]!r} for --format "
            f"{args.format}."
        )
    if args.batch_size < 1 or min(args.size) < 1:
        raise ValueError(
            f"--batch-size and --size must be positive, got {args.batch_size} and {args.size}."
        )
    if args.weights and args.random_weights:
        raise ValueError("--weights and --random-weights are mutually exclusive.")
    if not args.weights and not args.random_weights and not args.zoo:
        raise ValueError("Give the trained --weights, or --random-weights to try the export.")


def build(args: argparse.Namespace) -> Tuple[object, nn.Module]:
    """The config and its model, with weights, on the CPU, in evaluation mode."""
    file = config_file(args.zoo) if args.zoo else args.config_file
    weights = args.weights
    if weights is None and not args.random_weights:
        weights = get_checkpoint_url(args.zoo)
    if is_yacs(file):
        cfg = load_yaml_config(file, args.opts)
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
    else:
        cfg = load_lazy_config(file, args.opts)
        model = instantiate(cfg.model)
    if weights:
        load_or_resume(ATSSCheckpointer(model), weights, resume=False)
    else:
        spread_scores(model)
    return cfg, model.eval()


def is_yacs(file: str) -> bool:
    """Whether a config is one of Detectron2's YAML files; a saved LazyConfig is YAML too."""
    if not file.endswith((".yaml", ".yml")) or not os.path.isfile(file):
        return False
    return "_target_" not in Path(file).read_text(encoding="utf-8")


def num_classes_of(model: nn.Module) -> int:
    return int(getattr(model, "roi_heads", model.proposal_generator).num_classes)


def write(model: nn.Module, path: Path, args: argparse.Namespace) -> None:
    common = (path, args.batch_size, tuple(args.size), args.raw_heads)
    if args.format == "torchscript":
        export_torchscript(model, *common)
    elif args.format == "export":
        export_program(model, *common)
    else:
        export_onnx(model, *common, opset=args.opset)


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
