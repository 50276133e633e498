#!/usr/bin/env python
"""The paper's tables as configs: list them, build them, train them in small.

    python tools/ablation_table.py --list               # every row and its difference
    python tools/ablation_table.py --list topk          # of a folder, or of single rows
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

import torch
from ablation_differences import difference, faults, showing
from ablation_report import markdown, orderings, plot, results_table, write_report
from ablation_rows import Row, find_rows, load_parent, load_row, measured_ap, select_rows
from ablation_toy import SIZES, Settings, run_rows

from detectron2.config import instantiate


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", nargs="*", metavar="ROW", help="rows, differences, AP; all if none")
    what.add_argument("--check", nargs="*", metavar="ROW", help="build rows and show their parts")
    what.add_argument("--run", nargs="+", metavar="ROW", help="train rows, see --toy")
    parser.add_argument(
        "--runs", default=".", metavar="FOLDER", help="where output folders of runs on COCO are"
    )
    toy = parser.add_argument_group("--run")
    toy.add_argument("--toy", action="store_true", help="on the embedded shapes (needed)")
    toy.add_argument("--seeds", nargs="+", type=int, default=[1, 2], metavar="N")
    toy.add_argument("--size", default="small", help=f"of the model: {', '.join(SIZES)}")
    toy.add_argument("--iterations", type=int, default=0, help="instead of those of the size")
    toy.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config overrides")
    toy.add_argument("--workers", type=int, default=1, help="runs at a time")
    toy.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    toy.add_argument("--output", default="output/ablation_table", metavar="FOLDER")
    toy.add_argument("--report", metavar="FILE", help="Markdown report with a picture beside it")
    return parser.parse_args(argv)


def list_rows(rows: List[Row], runs: Path) -> int:
    """Print what each row is, and what is known about its AP."""
    lines = []
    for row in rows:
        cfg = load_row(row)
        ap = measured_ap(cfg, runs)
        lines.append(
            [
                row.table,
                row.title,
                f"configs/{row.name}.py",
                _difference_text(row, cfg),
                "" if row.ap is None else f"{row.ap:.1f} ({row.source}, {row.split})",
                "" if ap is None else f"{ap:.1f}",
            ]
        )
    header = ["table", "row", "config", "difference from its parent", "published AP", "our AP"]
    print(markdown(header, lines))
    return 0


def check_rows(rows: List[Row]) -> int:
    """Build each row at full size without memory for its weights, and print its parts.

    Returns:
        1 if a row differs from its parent in another way than its file says.
    """
    lines, found = [], []
    for row in rows:
        cfg = load_row(row)
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
        if row.parent:
            found += faults(row, difference(load_parent(row), cfg))
    header = ["row", "assigner", "box transform", "head, box loss", "anchors", "parameters"]
    print(markdown(header, lines))
    print(f"\n{len(lines)} rows built; {len(found)} faults.")
    for fault in found:
        print(f"  {fault}")
    return 1 if found else 0


def describe(part: Any) -> str:
    """Class and those arguments that are not at their defaults; a first one like k always."""
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


def train_rows(rows: List[Row], args: argparse.Namespace) -> int:
    """Train rows on the embedded shapes, print the table, write picture and report."""
    if not args.toy:
        raise ValueError(
            "--run trains on the embedded shapes and wants --toy with it. On COCO use "
            f"tools/lazyconfig_train_net.py --config-file configs/{rows[0].name}.py"
        )
    settings = Settings(args.size, args.iterations, tuple(args.set), args.threads)
    output = Path(args.output)

    def say(line: str) -> None:
        print(line, flush=True)

    results = run_rows(rows, settings, args.seeds, output, args.workers, say)
    print(f"\n{results_table(rows, results)}\n")
    header = ["rows of a table, second minus first", "the paper", "here, by seed", "verdict"]
    pairs = orderings(rows, results)
    if pairs:
        print(markdown(header, pairs))
    plot(rows, results, output / "ablation.png")
    print(f"\nPicture: {output / 'ablation.png'}")
    if args.report:
        command = shlex.join(["python", "tools/ablation_table.py", *args.command])
        write_report(rows, results, Path(args.report), command)
        print(f"Report: {args.report}")
    return 0


def _difference_text(row: Row, cfg: Any) -> str:
    return showing(row, difference(load_parent(row), cfg) if row.parent else {})


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    args.command = list(sys.argv[1:] if argv is None else argv)
    rows = find_rows()
    wanted = args.list or args.check or args.run
    rows = select_rows(rows, wanted) if wanted else rows
    if args.list is not None:
        return list_rows(rows, Path(args.runs))
    if args.check is not None:
        return check_rows(rows)
    return train_rows(rows, args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
