"""Training rows on the embedded shapes, all under the same conditions.

The parts of the model that the four axes switch are the row's; all the rest is
`configs/toy/atss_toy.py`. Data, their order and the initial backbone follow from the seed.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from atss.data import register_toy_shapes
from atss.model_zoo import config_file
from atss.training import import_modules, load_lazy_config, train_lazy, update_lazy_config
from omegaconf import DictConfig

from detectron2.utils.env import seed_all_rng

from .differences import flatten
from .rows import Row, load

# The parts of a model that make up its method; the backbone is not among them.
AXES = ("assigner", "box2box_transform", "head", "loss", "anchor_generator")

_THIN = [
    "model.backbone.stem_out_channels=16",
    "model.backbone.res2_out_channels=16",
    "model.backbone.out_channels=32",
    "dataloader.train.total_batch_size=8",
    "train.max_iter=600",
    "optimizer.lr=0.002",
]
SIZES = {
    "tiny": [*_THIN, "model.head.num_convs=1", "dataloader.train.total_batch_size=2"],
    "small": _THIN,
    "toy": [],  # that of `make demo`
}

_TRAIN_KEYS = ("train.max_iter", "train.amp.enabled", "train.amp.precision")
_WITHOUT_EFFECT = (
    "dataloader.evaluator.output_dir",
    "train.output_dir",
    "train.eval_period",
    "train.log_period",
    "train.checkpointer",
)


@dataclass(frozen=True)
class Settings:
    """The conditions that all rows share.

    Attributes:
        size: "small" (two minutes of one CPU core a run), "toy" (the model and schedule of `make
            demo`) or "tiny" (a short test).
        iterations: of training; 0 for those of the size.
        overrides: key=value for the config, applied last.
        threads: CPU threads of a run.
        modules: imported by the processes that train.
    """

    size: str = "small"
    iterations: int = 0
    overrides: Tuple[str, ...] = ()
    threads: int = 1
    modules: Tuple[str, ...] = ()


def toy_config(row: Row, settings: Settings) -> DictConfig:
    """The row's method on the toy's data, backbone and schedule.

    Raises:
        ValueError: for an unknown size, or an override that changes nothing.
    """
    if settings.size not in SIZES:
        raise ValueError(f"Unknown --size {settings.size!r}; known are {sorted(SIZES)}.")
    cfg = load_lazy_config(config_file("toy/atss_toy"))
    method = load(row.name).model
    num_convs = cfg.model.head.num_convs
    for part in AXES:
        cfg.model[part] = method[part]
    cfg.model.head.num_convs = num_convs  # the size of the model is the toy's
    overrides = [
        "train.eval_period=0",  # once, at the end
        "train.checkpointer.period=1000000",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        *SIZES[settings.size],
        *([f"train.max_iter={settings.iterations}"] if settings.iterations else []),
        *settings.overrides,
    ]
    return update_lazy_config(cfg, overrides)


def fingerprint(cfg: DictConfig) -> str:
    """Hash that is equal for configs that train the same model in the same way."""
    flat = flatten(cfg, resolve=True, defaults=False)
    toy = flatten(load_lazy_config(config_file("toy/atss_toy")), resolve=True, defaults=False)

    def counts(key: str) -> bool:
        # Entries of `train` count where they differ from the toy config, so that adding an entry
        # there does not make finished runs look different; folders and periods never count.
        if key.startswith(_WITHOUT_EFFECT):
            return False
        return not key.startswith("train.") or key in _TRAIN_KEYS or flat[key] != toy.get(key)

    flat = {key: value for key, value in flat.items() if counts(key)}
    content = json.dumps(flat, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def run_rows(
    rows: Sequence[Row],
    settings: Settings,
    seeds: Sequence[int],
    output: Path,
    workers: int = 1,
) -> Dict[str, List[Dict[str, Any]]]:
    """Train each row with each seed; runs that exist already are not repeated.

    Rows that give the same config share their runs.

    Args:
        rows: what to train.
        settings: the conditions, equal for all.
        seeds: one run for each.
        output: folder with one folder per run, whose `result.json` is written last.
        workers: runs at a time.

    Returns:
        Name of the row -> results in the order of the seeds: "bbox" with AP, "seconds",
        "cpu_seconds" and others.
    """
    register_toy_shapes()  # rendered once, before parallel runs read it
    marks = {row.name: fingerprint(toy_config(row, settings)) for row in rows}
    first: Dict[str, Row] = {}
    for row in rows:
        first.setdefault(marks[row.name], row)
    jobs = [
        (row, seed, output / f"{mark}_seed{seed}") for seed in seeds for mark, row in first.items()
    ]
    missing = [job for job in jobs if not (job[2] / "result.json").is_file()]
    print(f"{len(rows)} rows, {len(jobs)} different runs, {len(missing)} of them still to train.")
    for number, result in enumerate(_train(missing, settings, workers), start=1):
        print(
            f"[{number}/{len(missing)}] {result['row']}, seed {result['seed']}: "
            f"AP {result['bbox']['AP']:.1f} in {result['seconds']:.0f} s",
            flush=True,
        )
    return {
        name: [
            json.loads((output / f"{mark}_seed{seed}" / "result.json").read_text())
            for seed in seeds
        ]
        for name, mark in marks.items()
    }


def _train(
    jobs: Sequence[Tuple[Row, int, Path]], settings: Settings, workers: int
) -> Iterator[Dict[str, Any]]:
    """Results of runs as they are finished; in this process for one worker."""
    if workers == 1 or not jobs:
        for job in jobs:
            yield _run(*job, settings)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, import_modules, (settings.modules,)) as pool:
        for future in as_completed([pool.submit(_run, *job, settings) for job in jobs]):
            yield future.result()


def _run(row: Row, seed: int, folder: Path, settings: Settings) -> Dict[str, Any]:
    """Train and evaluate one row with one seed, in this process; returns what it writes."""
    torch.set_num_threads(settings.threads)
    register_toy_shapes()
    cfg = toy_config(row, settings)
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    folder.mkdir(parents=True)
    cfg.train.output_dir = str(folder)
    cfg.train.seed = seed
    seed_all_rng(seed)
    start, cpu_start = time.perf_counter(), time.process_time()
    with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log):
        results = train_lazy(cfg)
    content = {
        "row": row.name,
        "config": folder.name.rpartition("_seed")[0],
        "seed": seed,
        "iterations": cfg.train.max_iter,
        "batch": cfg.dataloader.train.total_batch_size,
        "threads": settings.threads,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        # COCO's evaluation gives NaN for a model without detections.
        "bbox": {
            key: 0.0 if math.isnan(value) else round(float(value), 3)
            for key, value in results["bbox"].items()
        },
    }
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, folder / "result.json")  # so that the file is never incomplete
    return content
