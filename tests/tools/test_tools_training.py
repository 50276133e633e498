"""The training tools as a user runs them: real processes, real files, two small images a step."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from atss.data import ToyShapesOptions
from atss.data.toy_shapes import render_dataset, split_paths
from conftest import REPO

TINY_LAZY = [
    "model.backbone.stem_out_channels=32", "model.backbone.norm=GN",
    "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0", "train.amp.enabled=False", "train.channels_last=False",
    "train.eval_period=0", "train.log_period=5", "train.checkpointer.period=10",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
]  # fmt: skip
TINY_YAML = [
    "MODEL.RESNETS.NORM", "GN", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.AMP.ENABLED", "False", "SOLVER.CHANNELS_LAST", "False", "TEST.EVAL_PERIOD", "0",
    "SOLVER.CHECKPOINT_PERIOD", "10", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Command-line options for a set of ten images with four classes."""
    root = tmp_path_factory.mktemp("shapes")
    options = ToyShapesOptions(
        image_size=64, num_train=10, num_val=4, max_size=40, num_classes=4, max_objects=3
    )
    folder = render_dataset(root, options)
    arguments = []
    for split in ("train", "val"):
        paths = split_paths(folder, split)
        arguments += [f"--{split}-json", str(paths.json_file), f"--{split}-images"]
        arguments += [str(paths.image_root)]
    return arguments


def run_tool(tool, arguments, cwd, ok=True, warnings="ignore"):
    """Output of a tool, which must succeed, or fail, as expected."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": warnings}
    process = subprocess.run(
        [sys.executable, str(REPO / "tools" / f"{tool}.py"), *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    output = process.stdout + process.stderr
    assert (process.returncode == 0) == ok, output[-3000:]
    return output


def arguments_for(tool, output, data, max_iter, *overrides):
    if tool == "train_net":
        config = ["--config-file", REPO / "configs/toy/atss_toy.yaml"]
        opts = [*TINY_YAML, "SOLVER.MAX_ITER", max_iter, "OUTPUT_DIR", output]
    else:
        config = ["--config-file", REPO / "configs/toy/atss_toy.py"]
        opts = [*TINY_LAZY, f"train.max_iter={max_iter}", f"train.output_dir={output}"]
    flags = [o for o in overrides if str(o).startswith("--")]
    return [*config, *flags, *data, *opts, *(o for o in overrides if o not in flags)]


def records(output):
    return [json.loads(line) for line in (Path(output) / "metrics.json").read_text().splitlines()]


def weights(file):
    return torch.load(file, map_location="cpu", weights_only=False)["model"]


@pytest.mark.parametrize("tool", ["train_net", "lazyconfig_train_net", "plain_train_net"])
def test_twenty_iterations_resume_where_they_stopped(tool, data, tmp_path):
    output = tmp_path / "out"
    text = run_tool(tool, arguments_for(tool, output, data, 20), tmp_path)
    assert "4 classes" in text, text[:1500]  # read from the file, and said
    assert (output / "model_0000009.pth").exists() and (output / "model_final.pth").exists()
    whole_rates = {r["iteration"]: r["lr"] for r in records(output) if "lr" in r}

    # As if it had been interrupted after ten of the twenty iterations.
    (output / "last_checkpoint").write_text("model_0000009.pth")
    (output / "metrics.json").unlink()
    text = run_tool(tool, arguments_for(tool, output, data, 20, "--resume"), tmp_path)
    assert "Starting training from iteration 10" in text
    resumed = {r["iteration"]: r["lr"] for r in records(output) if "lr" in r}
    assert resumed and min(resumed) > 9 and max(resumed) == 19
    for iteration, rate in resumed.items():
        if iteration in whole_rates:
            assert rate == pytest.approx(whole_rates[iteration], rel=1e-6)
    assert set(resumed) & set(whole_rates)


def test_evaluating_a_checkpoint_gives_what_training_ended_with(data, tmp_path):
    output = tmp_path / "out"
    tool = "lazyconfig_train_net"
    train = [*arguments_for(tool, output, data, 6), "model.selector.score_thresh=0.0"]
    run_tool(tool, train, tmp_path)
    trained = [r for r in records(output) if "bbox/AP" in r][-1]
    text = run_tool(
        tool,
        [
            *arguments_for(tool, tmp_path / "eval", data, 6, "--eval-only"),
            "model.selector.score_thresh=0.0",
            f"train.init_checkpoint={output / 'model_final.pth'}",
        ],
        tmp_path,
    )
    assert ap_of(text) == pytest.approx(trained["bbox/AP"], abs=1e-3)


def ap_of(text):
    line = [line for line in text.splitlines() if "copypaste" in line][-1]
    return float(line.rsplit(" ", 1)[1].split(",")[0])


@pytest.mark.parametrize("tool", ["train_net", "lazyconfig_train_net", "plain_train_net"])
def test_eval_only_with_resume_takes_the_last_checkpoint_or_says_there_is_none(
    tool, data, tmp_path
):
    flags = ("--eval-only", "--resume")
    text = run_tool(tool, arguments_for(tool, tmp_path, data, 6, *flags), tmp_path, ok=False)
    assert "there is no checkpoint" in text.strip().splitlines()[-1]

    (tmp_path / "last_checkpoint").write_text("other.pth")
    torch.save({"model": {"not.ours": torch.zeros(1)}}, tmp_path / "other.pth")
    text = run_tool(tool, arguments_for(tool, tmp_path, data, 6, *flags), tmp_path, ok=False)
    assert "match no parameter" in text.strip().splitlines()[-1]  # so it is that file that is read


def test_two_processes_equal_one_with_the_same_global_batch(data, tmp_path):
    tool = "lazyconfig_train_net"
    common = [
        "train.seed=3",
        "train.checkpointer.period=100",
        "optimizer._target_=torch.optim.SGD",
    ]
    results = []
    for processes in (1, 2):
        output = tmp_path / f"out{processes}"
        arguments = arguments_for(tool, output, data, 4)
        where = arguments.index(TINY_LAZY[0])
        arguments[where:where] = ["--num-gpus", processes]
        initial = [f"train.init_checkpoint={tmp_path / 'initial.pth'}"]
        if processes == 1:
            make_initial_weights(tmp_path / "initial.pth")
        text = run_tool(tool, [*arguments, *common, *initial], tmp_path, warnings="default")
        assert "FutureWarning" not in text
        results.append(weights(output / "model_final.pth"))
    start = weights(tmp_path / "initial.pth")
    moved = 0
    for name, one in results[0].items():
        torch.testing.assert_close(results[1][name], one, rtol=1e-4, atol=1e-6, msg=name)
        moved += not torch.equal(one, start[name])
    assert moved > 50  # they did train


def make_initial_weights(file):
    from atss.training import load_lazy_config

    from detectron2.config import instantiate

    torch.manual_seed(0)
    cfg = load_lazy_config(
        str(REPO / "configs/toy/atss_toy.py"), [*TINY_LAZY[:2], "model.num_classes=4"]
    )
    torch.save({"model": instantiate(cfg.model).state_dict()}, file)


@pytest.mark.parametrize(
    "tool, overrides, words",
    [
        ("lazyconfig_train_net", ["model.num_classes=7"], ["num_classes=7", "4 classes"]),
        ("train_net", ["MODEL.ATSS.NUM_CLASSES", 7], ["num_classes=7", "4 classes"]),
        ("lazyconfig_train_net", ["--resume"], ["FileNotFoundError", "no checkpoint in"]),
        ("plain_train_net", ["--resume"], ["FileNotFoundError", "no checkpoint in"]),
        ("train_net", ["MODEL.WEIGHTS", "missing.pth"], ["FileNotFoundError", "missing.pth"]),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_one(tool, overrides, words, data, tmp_path):
    text = run_tool(
        tool, arguments_for(tool, tmp_path / "out", data, 2, *overrides), tmp_path, False
    )
    last = text.strip().splitlines()[-1]
    assert all(word in last for word in words), text[-1500:]


@pytest.mark.parametrize("tool", ["train_net", "lazyconfig_train_net", "plain_train_net"])
def test_training_on_your_data_needs_no_validation_set(tool, data, tmp_path):
    output = tmp_path / "out"
    text = run_tool(tool, arguments_for(tool, output, data[:4], 2), tmp_path)
    assert "nothing will be evaluated" in text
    assert (output / "model_final.pth").exists() and (output / "config.yaml").exists()


def test_screen_is_short_and_the_rest_is_in_the_log(data, tmp_path):
    tool, output = "lazyconfig_train_net", tmp_path / "out"
    text = run_tool(tool, arguments_for(tool, output, data, 5), tmp_path, warnings="default")
    before = text.partition("total_loss")[0].splitlines()
    assert len(before) < 30, text
    for word in (
        "train on own_train, evaluate on own_val", "classes  4", "device   cpu, 1 process",
        "weights  random", "5 iterations of 2 images", f"output   {output}",
    ):  # fmt: skip
        assert word in text
    log = (output / "log.txt").read_text()
    assert log.count("Rank of current process: 0") == 1
    assert log.count("This run:") == 1 and "(bottom_up): ResNet" in log
    assert "FutureWarning" not in text and "\x1b" not in text + log

    # A second run into the folder is not silent; a run that is finished says so.
    text = run_tool(tool, arguments_for(tool, output, data, 2), tmp_path)
    assert f"{output} has the results of an earlier run" in text
    text = run_tool(tool, arguments_for(tool, output, data, 2, "--resume"), tmp_path)
    assert "results of an earlier run" not in text
    assert (
        "This run is finished: its last checkpoint has 2 iterations. Raise train.max_iter" in text
    )


def test_truncated_image_ends_training_in_one_line_that_names_it(data, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(data[3], images)
    for file in images.iterdir():
        file.write_bytes(file.read_bytes()[:-3000])
    yours = ["--train-json", data[1], "--train-images", images]
    tool = "lazyconfig_train_net"
    overrides = ["dataloader.train.num_workers=1"]
    text = run_tool(
        tool, arguments_for(tool, tmp_path / "o", yours, 2, *overrides), tmp_path, False
    )
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: {images}") and "Replace the file" in last
    assert "Traceback" not in text


def test_mistakes_of_several_processes_end_in_one_line_whatever_their_class(data, tmp_path):
    (tmp_path / "mistaken.py").write_text(
        "import multiprocessing\nclass Own(ValueError): pass\n"
        "if multiprocessing.parent_process(): raise Own('dear')\n"
    )
    arguments = arguments_for("lazyconfig_train_net", tmp_path / "out", data, 2)
    start = arguments.index(data[0])
    for flags, message in (
        (["--import", "mistaken"], "Own: dear"),
        ([], "A batch of 3 images cannot be shared by 2 processes"),
    ):
        given = [*arguments[:start], "--num-gpus", "2", *flags, *arguments[start:]]
        text = run_tool(
            "lazyconfig_train_net", [*given, "dataloader.train.total_batch_size=3"], tmp_path, False
        )
        assert message in text.strip().splitlines()[-1], text[-3000:]
        assert "Traceback" not in text


def test_your_own_part_is_imported_and_takes_its_own_keys(data, tmp_path):
    (tmp_path / "my_rule.py").write_text(
        "from atss import ASSIGNER_REGISTRY, ATSSAssigner\n\n\n"
        "@ASSIGNER_REGISTRY.register()\nclass MyRule(ATSSAssigner):\n"
        "    def __init__(self, my_key=1):\n        super().__init__(topk=my_key)\n"
        "        print('my key is', my_key)\n"
    )
    name = "MODEL.ATSS.ASSIGNER"
    overrides = ["--import", "my_rule", f"{name}.NAME", "MyRule", f"{name}.MY_KEY", "3"]
    arguments = arguments_for("train_net", tmp_path / "out", data, 2)
    text = run_tool("train_net", [*arguments[:2], *overrides[:2], *arguments[2:], *overrides[2:]],
                    tmp_path)  # fmt: skip
    assert "my key is 3" in text


def test_weights_of_something_else_are_refused(data, tmp_path):
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    tool = "lazyconfig_train_net"
    overrides = [f"train.init_checkpoint={tmp_path / 'other.pth'}"]
    text = run_tool(
        tool, arguments_for(tool, tmp_path / "out", data, 2, *overrides), tmp_path, False
    )
    assert "match no parameter" in text.strip().splitlines()[-1], text[-1500:]


def test_missing_annotation_file_is_named(data, tmp_path):
    broken = ["--train-json", "nowhere.json", *data[2:]]
    tool = "lazyconfig_train_net"
    text = run_tool(tool, arguments_for(tool, tmp_path / "out", broken, 2), tmp_path, False)
    assert "nowhere.json" in text.strip().splitlines()[-1]


def test_demo_leaves_pictures_and_checkpoint(tmp_path):
    text = run_tool(
        "demo",
        [
            "--quick", "--output", tmp_path / "demo", *TINY_LAZY,
            "train.max_iter=3", "train.eval_period=3", "train.log_period=1",
        ],
        tmp_path,
    )  # fmt: skip
    assert "AP50" in text and "Try next" in text
    for name in (
        "detections.png",
        "positives.png",
        "curves.png",
        "metrics.json",
        "model_final.pth",
    ):
        assert (tmp_path / "demo" / name).stat().st_size > 0, name


def test_assignments_of_own_images_are_drawn(data, tmp_path):
    run_tool(
        "visualize_assignments",
        ["--json", data[5], "--images", data[7], "--rules", "atss", "iou", "--output", "a.png"],
        tmp_path,
    )
    import cv2

    assert cv2.imread(str(tmp_path / "a.png")).shape[0] > 2 * 64
    large = tmp_path / "large"
    large.mkdir()
    content = json.loads(Path(data[5]).read_text())
    for image in content["images"]:
        image.update(width=3000, height=2000)
    cv2.imwrite(str(large / content["images"][0]["file_name"]), np.zeros((2000, 3000, 3), np.uint8))
    content["images"] = content["images"][:1]
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first]
    (tmp_path / "large.json").write_text(json.dumps(content))
    options = ["--rules", "atss", "--levels", "2", "--output", "b.png"]
    run_tool(
        "visualize_assignments", ["--json", "large.json", "--images", large, *options], tmp_path
    )
    assert cv2.imread(str(tmp_path / "b.png")).shape[1] == 2 * 640 + 4
    text = run_tool("visualize_assignments", ["--json", data[5]], tmp_path, ok=False)
    assert "--json and --images need each other" in text
