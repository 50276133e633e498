#!/usr/bin/env python3
"""Convert weights of the authors, mmdetection or torchvision to ours, or ours to theirs."""

import argparse
import os
import sys
from pathlib import Path
from typing import Dict, List, Optional

import _quiet  # noqa: F401
import torch
from atss.checkpoint import (
    IS_OPTIONAL,
    OVERRIDES_KEY,
    CheckpointError,
    convert_checkpoint,
    detect_source,
    num_classes_of,
    override_weights,
    read_checkpoint,
    rehead,
    write_checkpoint,
    yacs_overrides,
)
from atss.model_zoo import config_file
from atss.training import import_modules, load_lazy_config, tool_parser
from torch import Tensor

from detectron2.config import instantiate


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("input", metavar="IN", help="checkpoint file (.pth)")
    parser.add_argument("output", metavar="OUT", help="file to write; never left incomplete")
    parser.add_argument(
        "--from",
        dest="source",
        default="auto",
        choices=["auto", "author", "mmdet", "torchvision", "atss"],
        help="source of IN; recognised by default",
    )
    parser.add_argument(
        "--to", default="atss", choices=["atss", "author", "mmdet"], help="format of OUT"
    )
    parser.add_argument(
        "--config", help="LazyConfig, by name or file, of the model that OUT must fit"
    )
    parser.add_argument(
        "--num-classes", type=int, help="replace the class predictor in OUT, for as many classes"
    )
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Convert as the arguments say.

    Raises:
        OSError, ValueError: where that is impossible; OUT is then left as it was.
    """
    import_modules(args.modules)
    folder = os.path.dirname(os.path.abspath(args.output))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder!r} to write OUT to.")
    content = read_checkpoint(args.input)
    source = detect_source(content) if args.source == "auto" else args.source
    converted = convert_checkpoint(content, args.source, args.to)
    weights = converted.state_dict
    print(f"{args.input}: {source} -> {args.to}, {len(weights)} names mapped")
    show("dropped", [f"{name}: {reason}" for name, reason in converted.dropped.items()])
    # Weights that were converted earlier keep their overrides.
    overrides = converted.overrides or dict(content.get(OVERRIDES_KEY, {}))

    if args.num_classes is not None:
        if args.to != "atss":
            raise ValueError("--num-classes needs --to atss; convert in two steps.")
        weights, renewed = rehead(weights, args.num_classes)
        show("re-initialised", renewed)
    if args.config:
        if args.to != "atss":
            raise ValueError("--config describes a model of ours; it needs --to atss.")
        compare(weights, state_of_model(args.config, args.num_classes), args.config)

    if args.to == "atss":
        weights = override_weights(weights, overrides)
        result = {
            "model": weights,
            "__author__": f"converted from {source}",
            OVERRIDES_KEY: overrides,
        }
    else:
        result = {"model" if args.to == "author" else "state_dict": weights}
    write_checkpoint(result, args.output)
    if overrides and args.to == "atss":
        print(
            "These weights need the following config entries, which are in OUT too: loading it sets"
        )
        print("them in the model. A LazyConfig or YAML config for these weights has:")
        for (key, value), yacs_key in zip(overrides.items(), yacs_overrides(overrides)):
            print(f"  {key}={value}   ({yacs_key})")
    print(f"written: {args.output}")


def state_of_model(config: str, num_classes: Optional[int]) -> Dict[str, Tensor]:
    """State dict of a config's model, without memory for it."""
    path = config if os.path.isfile(config) else config_file(config)
    options = [f"model.num_classes={num_classes}"] if num_classes is not None else []
    with torch.device("meta"):
        return instantiate(load_lazy_config(path, options).model).state_dict()


def compare(weights: Dict[str, Tensor], model: Dict[str, Tensor], config: str) -> None:
    """Print what does not fit.

    Raises:
        CheckpointError: if something does not; backbones may lack the head.
    """
    weights, model = (
        {name: value for name, value in side.items() if not IS_OPTIONAL.fullmatch(name)}
        for side in (weights, model)
    )
    missing = sorted(set(model) - set(weights))
    extra = sorted(set(weights) - set(model))
    conflicts = [
        f"{name}: {tuple(value.shape)} in the file, {tuple(model[name].shape)} in the model"
        for name, value in weights.items()
        if name in model and value.shape != model[name].shape
    ]
    show("missing", missing)
    show("not in the model", extra)
    show("of another shape", conflicts)
    num_classes = num_classes_of(weights)
    if num_classes is not None and num_classes != num_classes_of(model):
        raise CheckpointError(
            f"The weights have {num_classes} classes, the model of {config} has another number; "
            "give --num-classes to replace the class predictor."
        )
    needed_missing = [n for n in missing if num_classes is not None or "bottom_up" in n]
    if needed_missing or extra or conflicts:
        raise CheckpointError(
            f"The weights do not fit the model of {config}: {len(needed_missing)} missing, "
            f"{len(extra)} too many, {len(conflicts)} of another shape. Choose the config with "
            "their depth, groups and deformable stages."
        )


def show(title: str, lines: List[str], most: int = 8) -> None:
    print(f"{title}: {len(lines)}")
    for line in lines[:most]:
        print(f"  {line}")
    if len(lines) > most:
        print(f"  and {len(lines) - most} more")


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    try:
        convert(args)
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
