"""Commands and Python code of the pages: tools accept them as printed, and they run, made small."""

import argparse
import json
import logging
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Dict, Iterator, List, Tuple, Union

import cv2
import numpy as np
import pytest
import torch
from atss import model_zoo
from atss.checkpoint import convert_checkpoint
from atss.data import ToyShapesOptions, defer_toy_shapes
from atss.data.toy_shapes import render_dataset, split_paths
from conftest import REPO
from pages import PAGES, commands_of, fenced_blocks
from test_extend import REGISTRIES, files_of_page

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_coco
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.utils.logger import setup_logger

Substitutions = List[Tuple[str, str]]  # regular expression, what takes its place


def adding(*options: str) -> Tuple[str, str]:
    """The substitution that adds options at the end of a command."""
    return r"\Z", " ".join(("", *options))


# Overrides that make a run small: two iterations of two small images on the CPU, in one process.
SMALL_IMAGES = (
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64,64] "
    "dataloader.test.mapper.augmentations.0.short_edge_length=64"
)
LAZY = (
    "train.max_iter=2 train.eval_period=0 train.device=cpu train.amp.enabled=False "
    "dataloader.train.total_batch_size=2 dataloader.train.num_workers=0 "
    f"dataloader.test.num_workers=0 {SMALL_IMAGES}"
)
YAML = (
    "SOLVER.MAX_ITER 2 TEST.EVAL_PERIOD 0 MODEL.DEVICE cpu SOLVER.AMP.ENABLED False "
    "SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0 INPUT.MIN_SIZE_TRAIN (64,) "
    "INPUT.MIN_SIZE_TEST 64"
)
# And the model of a COCO config as thin as the toy's.
THIN_LAZY = (
    "model.backbone.depth=18 model.backbone.stem_out_channels=32 "
    "model.backbone.res2_out_channels=32 model.backbone.out_channels=64"
)
THIN_YAML = (
    "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.STEM_OUT_CHANNELS 32 "
    "MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.FPN.OUT_CHANNELS 64"
)
ROWS = (
    "--size tiny --iterations 2 --seeds 1 --workers 1 --set train.device=cpu "
    f"model.backbone.out_channels=64 {SMALL_IMAGES}"
)
BENCHMARK = (
    "--image-size 64x96 --objects 1 --batch-sizes 1 --num-classes 3 --repeats 1 --threads 1 "
    "--model toy/atss_toy --no-growth --no-memory"
)
ONE_PROCESS = (
    r"--num-gpus \d+( --num-machines \d+ --machine-rank \d+ --dist-url \S+)?", "--num-gpus 1"
)  # fmt: skip

# How each command is tested. Keys are regular expressions of whole commands; the first that fits
# counts. A command with substitutions is run after them, with none as printed. One with a reason
# is not run: only its arguments are parsed.
COMMANDS: Dict[str, Union[str, Substitutions]] = {
    "make demo": [("make demo", "python tools/demo.py"), adding(LAZY)],
    "make (setup|test)": "downloads packages, and these tests are a part of it",
    "pip install .*": "changes the environment",
    "torchrun .*": "training/test_launch.py has it; the tool's own command is run here",
    "python tools/lazyconfig_train_net.py --slurm .*": "test_launch.py has a local cluster",
    "python tools/lazyconfig_train_net.py .* train.init_checkpoint=atss_R_101_FPN_2x.pth": [
        adding(LAZY)
    ],
    "python tools/lazyconfig_train_net.py .* --eval-only .*": [adding(LAZY, THIN_LAZY)],
    "python tools/lazyconfig_train_net.py --config-file configs/coco/.*": [
        ONE_PROCESS, adding(LAZY, THIN_LAZY, "train.init_checkpoint=")
    ],
    "python tools/lazyconfig_train_net.py --config-file configs/toy/.*": [adding(LAZY)],
    "python tools/train_net.py --config-file configs/coco/.*": [
        ONE_PROCESS, adding(YAML, THIN_YAML, "MODEL.WEIGHTS ''")
    ],
    "python tools/train_net.py --config-file configs/toy/.*": [adding(YAML)],
    "python -c .*": [],
    "python tools/convert_checkpoint.py IN OUT": "IN and OUT stand for any files",
    "python tools/convert_checkpoint.py .*": [],
    # With NMS this takes 20 s. Without onnxscript, which is optional, it is only parsed.
    "python tools/export_model.py .* --format onnx .*": [adding("--raw-heads --size 64 96")],
    "python tools/export_model.py .*": [],
    "python tools/ablation_table.py --list": [],
    "python tools/ablation_table.py --check": [adding("topk/k3")],
    "python tools/ablation_table.py --run .*": [
        ("boxes_or_points sample_selection ", ""), adding(ROWS)
    ],
    "python tools/compare.py detectors .*": [(r"--seconds \d+", "--seconds 0.1"), adding(LAZY)],
    "python tools/compare.py proposals .*": [
        (r"--iterations \d+", "--iterations 2"), (r"--batch-size \d+", "--batch-size 2")
    ],
    "python tools/stress/.*": "takes minutes",
    "python tools/benchmark.py .*--device cuda .*": "needs a GPU",
    "python tools/benchmark.py .*--markdown .*": [(" --compile", ""), adding(BENCHMARK)],
    "python tools/benchmark.py .*": "the command of a table that was measured earlier",
}  # fmt: skip
# Pages whose Python code other tests run, because it is files, or runs without this package.
PYTHON_ELSEWHERE = {"extend.md": "test_extend.py", "deploy.md": "export/test_export.py"}

TOY = ToyShapesOptions(image_size=64, num_train=4, num_val=3, max_size=40, max_objects=3)


def how_to_test(command: str) -> Union[str, Substitutions]:
    """What the table says of a command.

    Raises:
        AssertionError: it has no entry that fits.
    """
    for pattern, how in COMMANDS.items():
        if re.fullmatch(pattern, command):
            return how
    raise AssertionError(f"COMMANDS has no entry for: {command}")


@contextmanager
def as_in_a_new_process(folder) -> Iterator[pytest.MonkeyPatch]:
    """In a folder, without data sets, parts, modules and log handlers of earlier commands."""
    known = set(sys.modules)
    loggers = {name: logging.getLogger(name) for name in ("atss", "detectron2", "fvcore")}
    levels = {name: logger.level for name, logger in loggers.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("argv", "path"):
            patch.setattr(sys, name, list(getattr(sys, name)))
        for catalog in (DatasetCatalog, MetadataCatalog):
            patch.setattr(catalog, "data", {})
        register_all_coco("datasets")
        defer_toy_shapes()
        for registry in REGISTRIES:
            patch.setattr(registry, "_obj_map", dict(registry._obj_map))
        for logger in loggers.values():
            patch.setattr(logger, "handlers", [])
            patch.setattr(logger, "propagate", logger.propagate)
        setup_logger.cache_clear()  # it adds handlers only once
        yield patch
    setup_logger.cache_clear()
    for name, level in levels.items():
        loggers[name].setLevel(level)
    for name in set(sys.modules) - known:
        if name.startswith("my_"):
            del sys.modules[name]


def start(command: str) -> None:
    """Run a command, in this process.

    Raises:
        AssertionError: it ends with another code than 0.
    """
    program, *sys.argv = shlex.split(command)
    assert program == "python", f"only Python can be run here: {command}"
    try:
        if sys.argv[0] == "-c":
            exec(sys.argv[1], {})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert end.code in (None, 0), f"{command}: {end.code}"


class Accepted(Exception):
    """The parser of a tool has taken its arguments."""


def check_arguments(command: str) -> None:
    """Check that a tool takes the arguments of a command, or make its target.

    Raises:
        AssertionError: it does not.
    """
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        tool = [argument.startswith("tools/") for argument in arguments].index(True)
        program, arguments = "python", arguments[tool:]
        command = shlex.join([program, *arguments])
    if program == "make":
        dry_run = ["make", "--dry-run", *arguments]
        process = subprocess.run(dry_run, cwd=REPO, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    if program != "python" or not arguments[0].startswith("tools/"):
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise Accepted

    with as_in_a_new_process(REPO) as patch, pytest.raises(Accepted):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        start(command)


def make_data(folder) -> None:
    """Images and annotations where the pages have theirs: yours, COCO's, the embedded shapes."""
    shapes = render_dataset(folder / "datasets/toy_shapes", TOY)
    coco = folder / "datasets/coco"
    (coco / "annotations").mkdir(parents=True)
    classes = [c for c in COCO_CATEGORIES if c["isthing"]]
    for split in ("train", "val"):
        json_file, images = split_paths(shapes, split)
        shutil.copy(json_file, folder / f"{split}.json")
        shutil.copytree(images, folder / split)
        shutil.copytree(images, coco / f"{split}2017")
        content = {**json.loads(json_file.read_text()), "categories": classes}
        (coco / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    shutil.copytree(images, coco / "test2017")
    del content["annotations"]
    (coco / "annotations/image_info_test-dev2017.json").write_text(json.dumps(content))
    cv2.imwrite(str(folder / "image.jpg"), np.zeros((90, 120, 3), np.uint8))


def save_published(config: str, target: str, file) -> None:
    """Random weights of a config's model, in names of the authors or of mmdetection."""
    weights = model_zoo.get(config, device="cpu").state_dict()
    key = "model" if target == "author" else "state_dict"
    torch.save({key: convert_checkpoint(weights, target=target).state_dict}, file)


class Checkout:
    """A folder like that of this repository, in which somebody follows the pages."""

    def __init__(self, folder):
        self.folder = folder
        self.done = set()
        for name in ("configs", "docs"):
            shutil.copytree(REPO / name, folder / name)
        (folder / "tools").symlink_to(REPO / "tools")
        for path, code in files_of_page().items():
            (folder / path).write_text(code)
        make_data(folder)
        save_published("atss_R_101_FPN_2x", "author", folder / "ATSS_R_101_FPN_2x.pth")
        save_published("atss_R_50_FPN_1x", "mmdet", folder / "mmdet.pth")
        self.run("make demo")
        # The run of docs/weights.md has the same config.
        shutil.copytree(folder / "output/demo", folder / "output/atss_toy")

    def run(self, command: str) -> None:
        """Run a command as the table says, once."""
        how = how_to_test(command)
        is_possible = "--format onnx" not in command or find_spec("onnxscript")
        if isinstance(how, str) or command in self.done or not is_possible:
            return
        self.done.add(command)
        for pattern, replacement in how:
            command = re.sub(pattern, replacement, command, count=1)
        with self.entered():
            start(command)

    def run_code(self, code: str) -> None:
        with self.entered():
            exec(code, {})

    @contextmanager
    def entered(self) -> Iterator[None]:
        """With this data, and weights that need no network."""
        with as_in_a_new_process(self.folder) as patch:
            patch.delenv("DETECTRON2_DATASETS", raising=False)
            patch.setattr("atss.data.registration.ToyShapesOptions", lambda: TOY)
            published = str(self.folder / "mmdet.pth")
            patch.setitem(model_zoo._URLS, "coco/atss_R_50_FPN_1x", published)
            yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    yield Checkout(folder)
    shutil.rmtree(folder)  # 700 MB of weights


TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
SHOWN = [
    pytest.param(commands, id=f"{page}-{place}")
    for page, text in TEXTS.items()
    for place, commands in commands_of(text).items()
]
CODE = [
    pytest.param(code, id=f"{page}-block {number}")
    for page, text in TEXTS.items()
    for number, (language, code) in enumerate(fenced_blocks(text), start=1)
    if language == "python" and page not in PYTHON_ELSEWHERE
]


@pytest.mark.parametrize("commands", SHOWN)
def test_tools_take_the_commands_of_the_pages(commands):
    for command in commands:
        how_to_test(command)
        check_arguments(command)


@pytest.mark.parametrize("commands", SHOWN)
def test_commands_of_the_pages_run(commands, checkout):
    for command in commands:
        checkout.run(command)


@pytest.mark.parametrize("code", CODE)
def test_python_code_of_the_pages_runs(code, checkout):
    checkout.run_code(code)


@pytest.mark.parametrize("page, file", PYTHON_ELSEWHERE.items())
def test_python_code_that_is_not_run_here_is_run_by_another_test(page, file):
    assert f"docs/{page}" in (REPO / "tests" / file).read_text(encoding="utf-8")
    assert "```python" in TEXTS[page]


def test_every_entry_of_the_table_is_used():
    shown = [c for text in TEXTS.values() for place in commands_of(text).values() for c in place]
    used = [next(p for p in COMMANDS if re.fullmatch(p, command)) for command in shown]
    assert set(used) == set(COMMANDS)


def test_commands_are_read_from_blocks_and_text():
    page = """
```console
$ python tools/a.py  # with a comment
printed
$ make b
```
```bash
FOO=1 python tools/c.py \\
    --d "e f"
```
`tools/g.py --h`, `make
i`, `tools/j.py`, `not a command`
"""
    assert commands_of(page) == {
        "block 1": ["python tools/a.py", "make b"],
        "block 2": ["FOO=1 python tools/c.py --d 'e f'"],
        "text": ["python tools/g.py --h", "make i"],
    }


@pytest.mark.parametrize(
    "page, message",
    [
        ("```bash\nrm -r output\n```\n", "no entry for: rm -r output"),
        ("```sh\npython tools/new.py\n```\n", "no entry for: python tools/new.py"),
        ("`tools/new.py --now`", "no entry for: python tools/new.py --now"),
        ("```\npython tools/new.py\n```\n", "a plain block has the command python tools/new.py"),
        ("`tools/compare.py detectors --hours 1`", "compare.py detectors --hours 1: 2"),
        ("`python tools/ablation_table.py --run topk/k3 --tiny`", "--tiny: 2"),
    ],
)
def test_page_with_a_command_that_is_unknown_or_wrong_fails(page, message):
    with pytest.raises(AssertionError, match=message):
        for commands in commands_of(page).values():
            test_tools_take_the_commands_of_the_pages(commands)
