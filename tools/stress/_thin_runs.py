"""Thin training runs in a fork of this process, which can be killed in a phase of training."""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tools"))

import lazyconfig_train_net  # noqa: E402
import plain_train_net  # noqa: E402
import train_net  # noqa: E402
from atss.checkpoint import files  # noqa: E402
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
    "train.checkpointer.period=2", "train.checkpointer.asynchronous=False", "train.log_period=1",
]  # fmt: skip
YAML = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32",
    "MODEL.RESNETS.NORM", "GN", "MODEL.ATSS.HEAD.NUM_CONVS", "1", "MODEL.DEVICE", "cpu",
    "SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "0", "SOLVER.AMP.ENABLED", "False",
    "SOLVER.MAX_ITER", str(MAX_ITER), "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "3",
    "SOLVER.CHECKPOINTER.ASYNCHRONOUS", "False",
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
