#!/usr/bin/env python
"""Time ATSS compared with Detectron2's RetinaNet and FCOS, in one process and in turn.

Parts that are not convolution: assign, loss, post, deform_conv. Whole models: train, inference, and
the steps of preparing one for inference. Prints tables; writes benchmark.json and
benchmark.png. FCOS needs the main branch of Detectron2.

    python tools/benchmark.py assign loss post --threads 1
    python tools/benchmark.py train inference steps --threads 2 --repeats 5
    python tools/benchmark.py inference --model toy/atss_toy --image-size 256x256
    python tools/benchmark.py --device cuda --batch-sizes 1 8 16
"""

import argparse
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import _quiet  # noqa: F401

# Without this, the profiler that counts memory writes its own log to the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from _benchmark.parts import PARTS
from _benchmark.report import blocks, plot, row, tables, update_page
from _benchmark.timing import race
from _benchmark.whole_models import MODELS
from _environment import environment
from _reference_models import NO_FCOS, has_fcos
from atss.training import run_here, tool_parser

from detectron2.utils.events import EventStorage

_CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
CASES = {**PARTS, **MODELS}


def image_size(text: str) -> Tuple[int, int]:
    """(height, width) from "800x1344"."""
    try:
        height, width = (int(side) for side in text.split("x"))
    except ValueError:
        message = f"write HEIGHTxWIDTH, such as 800x1344, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"sides must be positive, got {text!r}")
    return height, width


def output_parser() -> argparse.ArgumentParser:
    """Options that do not change what is measured."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--output", default="output/benchmark", metavar="FOLDER")
    parser.add_argument(
        "--markdown", metavar="FILE", help="write the tables into their blocks of this page"
    )
    return parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, parents=[output_parser()])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(CASES)}; all by default"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each contestant")
    parser.add_argument(
        "--clock",
        choices=list(_CLOCKS),
        default="wall",
        help="process: processor time of this process, for a busy machine; needs --threads 1",
    )
    parser.add_argument("--image-size", type=image_size, default=(800, 1344), metavar="HxW")
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 7, 20, 50, 100, 300, 1000])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--model", default="coco/atss_R_50_FPN_1x", help="config of whole models")
    parser.add_argument(
        "--model-batch-sizes", type=int, nargs="+", default=[1], help="of whole models"
    )
    parser.add_argument("--compile", action="store_true", help="also measure whole models compiled")
    parser.add_argument("--num-classes", type=int, default=80)
    parser.add_argument("--no-growth", action="store_true", help="skip other sizes and classes")
    parser.add_argument("--no-memory", action="store_true", help="skip memory")
    return parser


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of all parts asked for, printed as they come."""
    rows = []
    for part in args.parts or CASES:
        for case in CASES[part](args):
            timings = race(
                case.contestants,
                args.device,
                args.repeats,
                warmup=1 if part in MODELS else 2,
                memory=not args.no_memory,
                shares=part in MODELS,
                clock=_CLOCKS[args.clock],
            )
            rows.append(row(case, timings))
            settings = ", ".join(f"{key} {value}" for key, value in case.settings.items())
            times = ", ".join(f"{name} {timing.min_ms:.2f}" for name, timing in timings.items())
            print(f"{part}: {settings}: {times} ms", flush=True)
    return rows


def main(args: argparse.Namespace) -> None:
    unknown = [part for part in args.parts if part not in CASES]
    if unknown:
        raise ValueError(f"Unknown part {unknown[0]!r}; known are {list(CASES)}.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device} needs a GPU, and there is none; use cpu.")
    num_threads = args.threads or torch.get_num_threads()
    if args.clock == "process" and (args.device != "cpu" or num_threads != 1):
        raise ValueError("--clock process counts one thread on the CPU: add --threads 1.")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = torch.device(args.device)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    facts = environment(args.device)
    print(", ".join(f"{key}: {value}" for key, value in facts.items()))
    if not has_fcos():
        print(f"FCOS is skipped: {NO_FCOS}.")
    torch.manual_seed(0)
    start = time.perf_counter()
    with EventStorage(0):  # Detectron2's losses write into it
        rows = measure(args)
    result = {
        "environment": facts,
        "arguments": {key: value for key, value in vars(args).items() if key != "output"},
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    (output / "benchmark.json").write_text(json.dumps(result, indent=1, default=str))
    plot(output / "benchmark.png", rows)
    printed = tables(rows)
    for part, table in printed.items():
        print(f"\n{part}\n\n{table}")
    print(f"\nWrote {output / 'benchmark.json'} and {output / 'benchmark.png'}.")
    if args.markdown:
        update_page(Path(args.markdown), blocks(rows, facts, _command()))
        if not args.no_growth and {"assign", "loss"} <= set(printed):
            plot(Path(args.markdown).with_suffix(".png"), rows)


def _command() -> str:
    """The command that measures this again, without its output options."""
    _, words = output_parser().parse_known_args()
    return shlex.join(["python", "tools/benchmark.py", *words])


if __name__ == "__main__":
    run_here(main, make_parser().parse_args())
