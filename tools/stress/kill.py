#!/usr/bin/env python
"""Training runs that are killed at random moments, resumed, and compared with an undisturbed one.

A series is one run in a folder of its own: it is killed (SIGKILL) up to `--kills-per-series` times,
each time in a phase drawn at random, and starts again with --auto-resume until it is done. After
each kill the folder must resume exactly after its last checkpoint; the last one of a series must
equal, bit for bit, that of the run that nothing disturbed. Series add up in kill.json::

    python tools/stress/kill.py --output output/stress/kill --kills 200
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tools"))

import lazyconfig_train_net  # noqa: E402
import plain_train_net  # noqa: E402
import train_net  # noqa: E402
from atss.checkpoint import files, read_checkpoint  # noqa: E402
from atss.checkpoint.finding import last_checkpoint  # noqa: E402
from atss.data import ToyShapesOptions, loader  # noqa: E402
from atss.data.toy_shapes import render_dataset, split_paths  # noqa: E402
from atss.detector import ATSSDetector  # noqa: E402
from atss.training import training_parser  # noqa: E402

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

MAX_ITER = 6
TOOLS = {"lazy": lazyconfig_train_net, "yaml": train_net, "plain": plain_train_net}
PHASES = ("data", "forward", "backward", "checkpoint", "evaluation")
LAZY = [
    "model.backbone.stem_out_channels=32", "model.backbone.res2_out_channels=32",
    "model.backbone.norm=GN", "model.head.num_convs=1",
    "model.selector.score_thresh=0.0",
    "dataloader.train.total_batch_size=4", "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0", f"train.max_iter={MAX_ITER}",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "train.device=cpu", "train.amp.enabled=False", "train.eval_period=3",
    "train.checkpointer.period=2", "train.log_period=1",
]  # fmt: skip
YAML = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32",
    "MODEL.RESNETS.NORM", "GN", "MODEL.ATSS.HEAD.NUM_CONVS", "1", "MODEL.DEVICE", "cpu",
    "SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "0", "SOLVER.AMP.ENABLED", "False",
    "SOLVER.MAX_ITER", str(MAX_ITER), "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "3",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
]  # fmt: skip


def make_data(folder: Path, num_train: int = 8) -> List[str]:
    """Options for a made data set of few small images."""
    options = ToyShapesOptions(
        image_size=64, max_size=40, max_objects=3, num_train=num_train, num_val=2, num_classes=2
    )
    rendered = render_dataset(folder, options)
    return [
        f"--{split}-{part}={getattr(split_paths(rendered, split), path)}"
        for split in ("train", "val")
        for part, path in (("json", "json_file"), ("images", "image_root"))
    ]


def command(
    kind: str, folder: Path, data: Sequence[str], *options: str, overrides: Sequence[str] = ()
) -> List[str]:
    """Arguments of the training tool of a kind for a thin run.

    Args:
        kind: a key of `TOOLS`.
        folder: of the run.
        data: of `make_data`.
        *options: such as "--resume".
        overrides: of the config, in the form that the kind has.
    """
    if kind == "yaml":
        file, own = "atss_toy.yaml", [*YAML, "OUTPUT_DIR", str(folder)]
    else:
        file, own = "atss_toy.py", [*LAZY, f"train.output_dir={folder}"]
    config = str(REPO / "configs/toy" / file)
    return ["--config-file", config, *data, *options, *own, *overrides]


def run_in_process(kind: str, arguments: Sequence[str]) -> Any:
    """What the training tool of a kind does in a worker, in this process."""
    try:
        return TOOLS[kind].main(training_parser("").parse_args(arguments))
    finally:
        for name in ("own_train", "own_val"):
            if name in DatasetCatalog:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)


def differences(first: Any, second: Any, name: str = "") -> Iterator[str]:
    """Names of what is not exactly equal in the contents of two checkpoints."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from differences(first[key], second[key], f"{name}/{key}")
    elif isinstance(first, (list, tuple)) and isinstance(second, type(first)):
        if len(first) != len(second):
            yield name
        for i, pair in enumerate(zip(first, second)):
            yield from differences(*pair, f"{name}/{i}")
    elif isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield name
    elif first != second:
        yield name


def curve(folder: Path) -> Dict[int, str]:
    """Results of the evaluations in metrics.json by iteration; losses there are smoothed.

    Raises:
        ValueError: an iteration is there twice.
    """
    found: Dict[int, str] = {}
    iterations = set()
    for line in (folder / "metrics.json").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut by a kill before the first checkpoint
            continue
        iteration = record["iteration"]
        if iteration == 0:  # killed before its first checkpoint, a run starts anew
            iterations.clear()
        if iteration in iterations:
            raise ValueError(f"{folder} has iteration {iteration} twice")
        iterations.add(iteration)
        results = {key: value for key, value in record.items() if "/" in key}
        if results:
            found[iteration] = json.dumps(results, sort_keys=True)  # NaN is not NaN
    return found


def watch_phases(tell: Callable[[str], None]) -> Callable[[], None]:
    """Say when a phase of training starts and ends.

    Args:
        tell: called with the name of a phase at its start, and with "" at its end.

    Returns:
        A function that ends this.
    """

    def told(function: Callable, phase_of: Callable[..., Optional[str]]) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            phase = phase_of(*args)
            if phase is None:
                return function(*args, **kwargs)
            tell(phase)
            try:
                return function(*args, **kwargs)
            finally:
                tell("")

        return call

    forward = lambda model, *_: "forward" if model.training else "evaluation"  # noqa: E731
    watched: List[Tuple[Any, str, Callable[..., Optional[str]]]] = [
        (loader._MappedImages, "__getitem__", lambda *_: "data"),
        (ATSSDetector, "forward", forward),
        (torch.Tensor, "backward", lambda *_: "backward"),
        (files, "_write_safely", lambda path, *_: "checkpoint"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in watched]
    for owner, name, phase_of in watched:
        setattr(owner, name, told(getattr(owner, name), phase_of))

    def end() -> None:
        for owner, name, function in before:
            setattr(owner, name, function)

    return end


class Life(NamedTuple):
    """What became of a process that trained.

    Attributes:
        code: exit code; negative for the signal that killed it.
        phase: in which it was killed; "" for between two.
        num_phases: how many it entered.
        output: last lines of what it printed.
    """

    code: int
    phase: str
    num_phases: int
    output: str


def live(
    kind: str,
    arguments: Sequence[str],
    kill: Optional[Tuple[str, int, float]] = None,
    number: int = signal.SIGKILL,
) -> Life:
    """Train in a fork of this process, which has everything imported; kill it if asked.

    Args:
        kind: a key of `TOOLS`.
        arguments: of the tool.
        kill: phase, at which of its starts, and how many seconds after it.
        number: the signal that is sent.
    """
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(reader)
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                watch_phases(lambda phase: os.write(writer, f"{phase}\n".encode()))
                run_in_process(kind, arguments)
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writer)
        seen = []
        with open(reader) as messages:
            for line in messages:
                seen.append(line.strip())
                if kill is not None and seen[-1] == kill[0] and seen.count(kill[0]) == kill[1]:
                    time.sleep(kill[2])
                    os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        log.seek(0)
        output = log.read().decode(errors="replace")[-3000:]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Life(code, seen[-1] if seen else "", sum(map(bool, seen)), output)


def run_series(
    kind: str,
    folder: Path,
    reference: Path,
    data: Sequence[str],
    num_kills: int,
    rng: random.Random,
    overrides: Sequence[str] = (),
) -> Counter:
    """One run, killed again and again, until it is done.

    Args:
        kind: a key of `TOOLS`.
        folder: of the run, new.
        reference: folder of the run that nothing disturbed.
        data: of `make_data`.
        num_kills: after as many, the run is left alone.
        rng: draws phase and moment of each kill.
        overrides: see `command`.

    Returns:
        How many kills met each phase; "finished before" counts those that came too late.

    Raises:
        AssertionError: the run lost more than it may, did not resume, or ended otherwise.
    """
    arguments = command(kind, folder, data, "--auto-resume", overrides=overrides)
    counts: Counter = Counter()
    for _ in range(num_kills):
        phase = rng.choice(PHASES)
        start = rng.randint(1, {"data": 16, "checkpoint": 6, "evaluation": 2}.get(phase, 4))
        saved = _num_saved(folder)
        life = live(kind, arguments, (phase, start, rng.uniform(0, 0.03)))
        if life.code == 0:
            counts["finished before"] += 1
            break
        assert life.code == -signal.SIGKILL, f"{kind} in {folder}: {life.output}"
        counts[life.phase or "between"] += 1
        assert _num_saved(folder) >= saved, f"{folder}: a checkpoint was lost"
    life = live(kind, arguments)
    assert life.code == 0, f"{kind} in {folder} does not resume: {life.output}"
    ends = [read_checkpoint(str(f / "model_final.pth")) for f in (folder, reference)]
    unequal = list(differences(*ends))
    assert not unequal, f"{kind} in {folder}: {unequal[:5]} differ from the undisturbed run"
    found, expected = curve(folder), curve(reference)
    # YAML runs write every 20 iterations: what was evaluated just before a kill may be missing.
    is_same = found.items() <= expected.items() if kind == "yaml" else found == expected
    assert is_same, f"{kind} in {folder}: metrics.json has {found}, not {expected}"
    left = [path.name for path in folder.glob("*.part")]
    assert not left, f"{folder}: {left} were left"
    return counts


def _num_saved(folder: Path) -> int:
    """Iterations that the newest complete checkpoint has done."""
    try:
        return read_checkpoint(last_checkpoint(str(folder)))["iteration"] + 1
    except FileNotFoundError:
        return 0


VARIANTS = {
    "lazy": ("lazy", []),
    "lazy, asynchronous": ("lazy", ["train.checkpointer.asynchronous=True"]),
    "lazy, a loading process": ("lazy", ["dataloader.train.num_workers=1"]),
    "yaml": ("yaml", []),
    "plain": ("plain", []),
}


def main(args: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/stress/kill"))
    parser.add_argument("--kills", type=int, default=200, help="of all calls for this folder")
    parser.add_argument("--kills-per-series", type=int, default=5)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "kill.json"
    results = json.loads(file.read_text()) if file.exists() else {"series": 0, "phases": {}}
    data_folder = options.output / "data"
    data = make_data(data_folder)
    phases = Counter(results["phases"])
    while sum(phases.values()) - phases["finished before"] < options.kills:
        name, (kind, overrides) = list(VARIANTS.items())[results["series"] % len(VARIANTS)]
        reference = options.output / f"undisturbed_{kind}"
        if not (reference / "model_final.pth").exists():
            shutil.rmtree(reference, ignore_errors=True)
            life = live(kind, command(kind, reference, data))
            assert life.code == 0, life.output
        folder = options.output / "series"
        shutil.rmtree(folder, ignore_errors=True)
        rng = random.Random(results["series"])
        phases += run_series(
            kind, folder, reference, data, options.kills_per_series, rng, overrides
        )
        results.update(
            series=results["series"] + 1,
            phases=dict(phases),
            kills=sum(phases.values()) - phases["finished before"],
            date=str(date.today()),
            torch=torch.__version__,
        )
        file.write_text(json.dumps(results, indent=1))
        print(f"series {results['series']} ({name}): {results['kills']} kills", flush=True)
    print(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
