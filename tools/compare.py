#!/usr/bin/env python
"""Train ATSS and Detectron2's own models on the embedded shapes, under equal conditions.

    python tools/compare.py detectors --seconds 200       # ATSS, RetinaNet, FCOS
    python tools/compare.py proposals --iterations 200    # Faster R-CNN with RPN or ATSS

Each writes its table to a folder below output/, see `--help` of the two.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import _quiet  # noqa: F401
import torch
from _markdown import markdown_table
from _reference_models import NO_FCOS, fcos, has_fcos, retinanet, rpn
from atss.checkpoint import ATSSCheckpointer
from atss.data import register_toy_shapes
from atss.model_zoo import config_file
from atss.training import (
    build_model,
    build_optimizer,
    evaluate_lazy,
    load_lazy_config,
    run_here,
    tool_parser,
    train_lazy,
)
from atss.training.loop import autocast_dtype
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from detectron2.config import instantiate
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling.meta_arch import ProposalNetwork
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

_DETECTORS = {"ATSS": lambda model: model, "RetinaNet": retinanet, "FCOS": fcos}
_DETECTORS_HELP = """ATSS, RetinaNet and FCOS, trained for the same time.

Backbone, pyramid, channels, number of head convolutions, data, batch, optimizer, shape of the
schedule and precision are equal; each model gets the same wall time, so a faster step means more
iterations. FCOS needs the main branch of Detectron2.
"""
_PROPOSALS_HELP = """ATSS and Detectron2's RPN as first stage of the same Faster R-CNN.

Seed, backbone, second stage, numbers of proposals, schedule and images are equal. The table has
the recall of the proposals (AR over IoU 0.5 to 0.95, 100 and 1000 per image) and the AP of the
detector.
"""


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=tool_parser)

    def add(name: str, description: str) -> argparse.ArgumentParser:
        summary = description.partition(".")[0]
        command = commands.add_parser(name, help=summary, description=description)
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--output", default=f"output/compare_{name}", metavar="FOLDER")
        return command

    command = add("detectors", _DETECTORS_HELP)
    command.add_argument(
        "--models", nargs="+", choices=list(_DETECTORS), help="default: all that can be built"
    )
    command.add_argument("--seconds", type=float, default=200, help="training time of each model")
    command.add_argument("opts", nargs="*", help="config overrides, key=value")
    command = add("proposals", _PROPOSALS_HELP)
    command.add_argument("--iterations", type=int, default=200)
    command.add_argument("--batch-size", type=int, default=8)
    return parser.parse_args(argv)


def compare_detectors(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Train detectors for the same time; a result for each.

    Raises:
        ValueError: if FCOS is asked for and this Detectron2 has none, before anything is trained.
    """
    if not has_fcos():
        if "FCOS" in (args.models or []):
            raise ValueError(f"{NO_FCOS}. Install that, or give --models ATSS RetinaNet.")
        print(f"FCOS is skipped: {NO_FCOS}.")
    names = args.models or [name for name in _DETECTORS if name != "FCOS" or has_fcos()]
    configs = {name: load_lazy_config(config_file("toy/atss_toy"), args.opts) for name in names}
    register_toy_shapes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, cfg in configs.items():
        print(f"{name}:", flush=True)
        cfg.train.seed = args.seed  # of the order of images
        OmegaConf.resolve(cfg.dataloader)  # its images are read as model.input_format says
        cfg.model = _DETECTORS[name](cfg.model)
        torch.manual_seed(args.seed)
        model, iterations, seconds = train_for(cfg, args.seconds, device)
        ap = evaluate_lazy(cfg, model.eval())["bbox"]
        metrics = {key: round(ap[key], 1) for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
        result = {"model": name, "seconds": round(seconds, 1), "iterations": iterations}
        rows.append({**result, **metrics})
        write_results(rows, args)
    return rows


def train_for(
    cfg: DictConfig, seconds: float, device: torch.device
) -> Tuple[nn.Module, int, float]:
    """Train for a time, of which the learning rate's schedule takes the used share as progress.

    Returns:
        The model, its iterations and the seconds used.
    """
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    multiplier = instantiate(cfg.lr_multiplier)
    dtype = autocast_dtype(cfg.train.amp.enabled, cfg.train.amp.precision, device)
    if dtype is not None and not hasattr(model, "proposal_generator"):
        model.head.register_forward_hook(_to_float32)
    model.train()
    iterations, used = 0, 0.0
    with EventStorage(0):
        loader = iter(instantiate(cfg.dataloader.train))
        next(loader)  # the time to start the workers does not count
        start = time.perf_counter()
        while used < 1:
            for group, rate in zip(optimizer.param_groups, base_rates):
                group["lr"] = rate * multiplier(used)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                losses = model(next(loader))
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


def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Tuple[List[Tensor], ...]:
    """Head outputs for losses of Detectron2 that cannot take bfloat16 on the CPU.

    fvcore's GIoU loss assigns float32 into bfloat16 there. Towers and backbone, nearly all of the
    work, stay in bfloat16.
    """
    return tuple([level.float() for level in maps] for maps in outputs)


def compare_proposals(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Train a Faster R-CNN with each first stage; a result for each."""
    for name in ("fvcore", "detectron2", "atss"):
        setup_logger(name=name)
    register_toy_shapes()
    rows = []
    for name in ("RPN", "ATSS"):
        cfg = load_lazy_config(config_file("toy/faster_rcnn_atss_toy"))
        if name == "RPN":
            cfg.model.proposal_generator = rpn(cfg.model.proposal_generator.selector)
        cfg.dataloader.train.total_batch_size = args.batch_size
        cfg.train.max_iter = args.iterations
        cfg.train.eval_period = 0
        cfg.train.seed = args.seed
        cfg.train.amp.enabled = False  # so that rounding does not favour one of them
        folder = Path(args.output) / name
        folder.mkdir(parents=True, exist_ok=True)
        cfg.train.output_dir = str(folder)
        seed_all_rng(args.seed)
        start = time.perf_counter()
        results = train_lazy(cfg)["bbox"]  # evaluates once, at the end
        minutes = (time.perf_counter() - start) / 60
        model = build_model(cfg)
        ATSSCheckpointer(model).load(str(folder / "model_final.pth"))
        results = {**proposal_recall(cfg, model.eval()), **results}
        metrics = ("AR@100", "AR@1000", "AP", "AP50", "AP75")
        rows.append({"first stage": name, **{key: round(results[key], 1) for key in metrics}})
        rows[-1]["minutes"] = round(minutes, 1)
        write_results(rows, args)
    return rows


def proposal_recall(cfg: DictConfig, model: nn.Module) -> Dict[str, float]:
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


def write_results(rows: List[Dict[str, Any]], args: argparse.Namespace) -> str:
    """Write results.json and table.md; returns the table."""
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    said = {key: value for key, value in vars(args).items() if key not in ("output", "modules")}
    settings = ", ".join(f"{key} {value}" for key, value in said.items())
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(rows, indent=1))
    (output / "table.md").write_text(f"{settings}\n\n{table}\n")
    return table


def main(args: argparse.Namespace) -> None:
    compare = compare_detectors if args.command == "detectors" else compare_proposals
    print(f"\n{write_results(compare(args), args)}")


if __name__ == "__main__":
    run_here(main, parse_arguments())
