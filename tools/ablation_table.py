#!/usr/bin/env python
"""The paper's tables as configs: list their rows, build them, train small versions of them.

    python tools/ablation_table.py --list               # every row and its differences
    python tools/ablation_table.py --list topk          # those of a folder, or single ones
    python tools/ablation_table.py --check              # build each at full size, show its parts
    python tools/ablation_table.py --run boxes_or_points topk/k3 --toy --seeds 1 2

On COCO, train a row like any other config: tools/lazyconfig_train_net.py --config-file
configs/ablations/topk/k3.py; `--list` then shows the AP of its metrics.json.
"""

import argparse
import inspect
import shlex
import sys
from pathlib import Path
from typing import Any, List, Optional

import _quiet  # noqa: F401
import torch
from _ablations.differences import describe_changes, faults
from _ablations.report import orderings, orderings_table, plot, results_table, write_report
from _ablations.rows import Row, find_rows, load, measured_ap, select_rows
from _ablations.toy_runs import SIZES, Settings, run_rows
from _markdown import markdown_table
from atss.training import run_here, tool_parser

from detectron2.config import instantiate


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--list", nargs="*", metavar="ROW", help="show differences and AP; of all by default"
    )
    what.add_argument(
        "--check", nargs="*", metavar="ROW", help="build, show parts, compare with the parent"
    )
    what.add_argument("--run", nargs="+", metavar="ROW", help="train, with --toy")
    parser.add_argument(
        "--runs", default=".", metavar="FOLDER", help="where the output folders of runs on COCO are"
    )
    toy = parser.add_argument_group("--run")
    toy.add_argument("--toy", action="store_true", help="on the embedded shapes (required)")
    toy.add_argument("--seeds", nargs="+", type=int, default=[1, 2], metavar="N")
    toy.add_argument(
        "--size", default="small", help=f"size of model and schedule: {', '.join(SIZES)}"
    )
    toy.add_argument("--iterations", type=int, default=0, help="in place of those of --size")
    toy.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config overrides")
    toy.add_argument("--workers", type=int, default=1, help="runs at a time")
    toy.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    toy.add_argument("--output", default="output/ablation_table", metavar="FOLDER")
    toy.add_argument("--report", metavar="FILE", help="Markdown report to write, with a picture")
    return parser.parse_args(argv)


def list_rows(rows: List[Row], runs: Path) -> None:
    """Print rows, their differences from their parents, published and own AP."""
    lines = []
    for row in rows:
        cfg = load(row.name)
        ap = measured_ap(cfg, runs)
        lines.append(
            [
                row.table,
                row.title,
                f"configs/{row.name}.py",
                describe_changes(row, load(row.origin), cfg),
                "" if row.ap is None else f"{row.ap:.1f} ({row.source}, {row.split})",
                "" if ap is None else f"{ap:.1f}",
            ]
        )
    header = ["table", "row", "config", "differences from its parent", "published AP", "our AP"]
    print(markdown_table(header, lines))


def check_rows(rows: List[Row]) -> int:
    """Build each row at full size without memory for its weights, and print its parts.

    Returns:
        1 if a row differs from its parent in another way than it declares.
    """
    lines, found = [], []
    for row in rows:
        cfg = load(row.name)
        with torch.device("meta"):
            model = instantiate(cfg.model)
        core = model.proposal_generator
        anchors = instantiate(cfg.model.anchor_generator)
        first_level = list(anchors.cell_anchors)[0]
        cell = (first_level[:, 2:] - first_level[:, :2]).tolist()
        sizes = ", ".join(f"{width:.0f}x{height:.0f}" for width, height in cell)
        lines.append(
            [
                f"{row.table}: {row.title}",
                describe(core.assigner),
                describe(core.box2box_transform),
                describe_head(core),
                f"{anchors.num_anchors[0]}: {sizes} at stride {anchors.strides[0]}",
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
            ]
        )
        found += faults(row, load(row.origin), cfg)
    header = ["row", "assigner", "box transform", "head, box loss", "anchors", "parameters"]
    print(markdown_table(header, lines))
    print(f"\n{len(lines)} rows built; {len(found)} faults.")
    for fault in found:
        print(f"  {fault}")
    return 1 if found else 0


def describe(part: Any) -> str:
    """Class with the arguments that are not at their defaults, and always the first, such as k."""
    arguments = []
    for i, parameter in enumerate(inspect.signature(type(part)).parameters.values()):
        value = getattr(part, parameter.name, parameter.default)
        default = parameter.default
        is_list = isinstance(value, (list, tuple)) and isinstance(default, (list, tuple))
        is_default = list(value) == list(default) if is_list else value == default
        if not is_default or (i == 0 and not is_list):
            arguments.append(f"{parameter.name}={value}")
    return f"{type(part).__name__}({', '.join(arguments)})"


def describe_head(core: Any) -> str:
    """The switches of axis 3."""
    norms = {type(m).__name__ for m in core.head.cls_tower.modules() if "Norm" in type(m).__name__}
    deformable = any("Deform" in type(m).__name__ for m in core.head.modules())
    words = [
        ", ".join(sorted(norms)) or "no norm",
        "centerness" if core.head.centerness is not None else "no centerness",
        "scales" if any(True for _ in core.head.scales.parameters()) else "no scales",
        *(["deformable"] if deformable else []),
        f"{core.loss.box_loss} x{core.loss.box_loss_weight:g}",
    ]
    return ", ".join(words)


def train_rows(rows: List[Row], args: argparse.Namespace) -> None:
    """Train rows on the embedded shapes, print the results, write picture and report."""
    if not args.toy:
        raise ValueError(
            "--run trains on the embedded shapes and needs --toy with it. On COCO use "
            f"tools/lazyconfig_train_net.py --config-file configs/{rows[0].name}.py"
        )
    settings = Settings(
        args.size, args.iterations, tuple(args.set), args.threads, tuple(args.modules)
    )
    output = Path(args.output)
    results = run_rows(rows, settings, args.seeds, output, args.workers)
    print(f"\n{results_table(rows, results)}\n")
    pairs = orderings(rows, results)
    if pairs:
        print(orderings_table(pairs))
    plot(rows, results, output / "ablation.png")
    print(f"\nPicture: {output / 'ablation.png'}")
    if args.report:
        command = shlex.join(["python", "tools/ablation_table.py", *sys.argv[1:]])
        write_report(rows, results, Path(args.report), command)
        print(f"Report: {args.report}")


def main(args: argparse.Namespace) -> int:
    rows = find_rows()
    wanted = args.list or args.check or args.run
    rows = select_rows(rows, wanted) if wanted else rows
    if args.check is not None:
        return check_rows(rows)
    if args.list is not None:
        list_rows(rows, Path(args.runs))
    else:
        train_rows(rows, args)
    return 0


if __name__ == "__main__":
    run_here(main, parse_arguments())
