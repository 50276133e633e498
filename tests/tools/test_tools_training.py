"""The training tools as a user runs them: real processes, real files, two small images a step."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from atss.training import load_lazy_config
from conftest import REPO, run_tool, your_data

from detectron2.config import instantiate

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
LAZY = "lazyconfig_train_net"
TOOLS = ["train_net", LAZY, "plain_train_net"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Command-line options for a set of ten images with four classes."""
    root = tmp_path_factory.mktemp("shapes")
    options = your_data(root, num_train=10, num_val=4, num_classes=4).items()
    return [part for key, value in options for part in (f"--{key.replace('_', '-')}", value)]


def arguments_for(tool, output, data, max_iter, *overrides):
    if tool == "train_net":
        config = ["--config-file", REPO / "configs/toy/atss_toy.yaml"]
        opts = [*TINY_YAML, "SOLVER.MAX_ITER", max_iter, "OUTPUT_DIR", output]
    else:
        config = ["--config-file", REPO / "configs/toy/atss_toy.py"]
        opts = [*TINY_LAZY, f"train.max_iter={max_iter}", f"train.output_dir={output}"]
    return [*config, *data, *opts, *overrides]


def train(tool, folder, data, max_iter, flags=(), overrides=(), **options):
    """Output of a training tool that works in `folder` and writes below `folder / "out"`."""
    arguments = arguments_for(tool, folder / "out", data, max_iter, *overrides)
    return run_tool(tool, [*flags, *arguments], folder, **options)


def mistake(*arguments, **options):
    """Last line of what a training tool that fails says."""
    text = train(*arguments, **options, ok=False)
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def records(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def weights(file):
    return torch.load(file, map_location="cpu", weights_only=False)["model"]


@pytest.mark.parametrize("tool", TOOLS)
def test_twenty_iterations_resume_where_they_stopped(tool, data, tmp_path):
    output = tmp_path / "out"
    text = train(tool, tmp_path, data, 20)
    assert "4 classes" in text, text[:1500]  # read from the file, and said
    assert (output / "model_0000009.pth").exists() and (output / "model_final.pth").exists()
    whole_rates = {r["iteration"]: r["lr"] for r in records(output) if "lr" in r}

    # As if it had been interrupted after ten of the twenty iterations.
    (output / "last_checkpoint").write_text("model_0000009.pth")
    (output / "metrics.json").unlink()
    text = train(tool, tmp_path, data, 20, ["--resume"])
    assert "Starting training from iteration 10" in text
    resumed = {r["iteration"]: r["lr"] for r in records(output) if "lr" in r}
    assert resumed and min(resumed) > 9 and max(resumed) == 19
    common = set(resumed) & set(whole_rates)
    assert common
    for iteration in common:
        assert resumed[iteration] == pytest.approx(whole_rates[iteration], rel=1e-6)


def test_evaluating_a_checkpoint_gives_what_training_ended_with(data, tmp_path):
    overrides = ["model.selector.score_thresh=0.0"]
    train("lazyconfig_train_net", tmp_path, data, 6, overrides=overrides)
    trained = [r for r in records(tmp_path / "out") if "bbox/AP" in r][-1]
    overrides += [
        f"train.init_checkpoint={tmp_path / 'out/model_final.pth'}",
        f"train.output_dir={tmp_path / 'eval'}",
    ]
    text = train("lazyconfig_train_net", tmp_path, data, 6, ["--eval-only"], overrides)
    line = [line for line in text.splitlines() if "copypaste" in line][-1]
    ap = float(line.rsplit(" ", 1)[1].split(",")[0])
    assert ap == pytest.approx(trained["bbox/AP"], abs=1e-3)


@pytest.mark.parametrize("tool", TOOLS)
def test_eval_only_with_resume_takes_the_last_checkpoint_or_says_there_is_none(
    tool, data, tmp_path
):
    flags = ["--eval-only", "--resume"]
    assert "there is no checkpoint" in mistake(tool, tmp_path, data, 6, flags)

    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/last_checkpoint").write_text("other.pth")
    torch.save({"model": {"not.ours": torch.zeros(1)}}, tmp_path / "out/other.pth")
    # So it is that file that is read.
    assert "match no parameter" in mistake(tool, tmp_path, data, 6, flags)


def test_two_processes_equal_one_with_the_same_global_batch(data, tmp_path):
    overrides = [
        "train.seed=3",
        "train.checkpointer.period=100",
        "optimizer._target_=torch.optim.SGD",
        f"train.init_checkpoint={tmp_path / 'initial.pth'}",
    ]
    cfg = load_lazy_config(
        str(REPO / "configs/toy/atss_toy.py"), [*TINY_LAZY[:2], "model.num_classes=4"]
    )
    torch.save({"model": instantiate(cfg.model).state_dict()}, tmp_path / "initial.pth")
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        flags = ["--num-gpus", processes]
        tool = "lazyconfig_train_net"
        text = train(tool, folder, data, 4, flags, overrides, warnings="default")
        assert "FutureWarning" not in text
        results.append(weights(folder / "out/model_final.pth"))
    start = weights(tmp_path / "initial.pth")
    moved = 0
    for name, one in results[0].items():
        torch.testing.assert_close(results[1][name], one, rtol=1e-4, atol=1e-6, msg=name)
        moved += not torch.equal(one, start[name])
    assert moved > 50  # they did train


@pytest.mark.parametrize(
    "tool, flags, overrides, words",
    [
        (LAZY, [], ["model.num_classes=7"], ["num_classes=7", "4 classes"]),
        ("train_net", [], ["MODEL.ATSS.NUM_CLASSES", 7], ["num_classes=7", "4 classes"]),
        (LAZY, ["--resume"], [], ["FileNotFoundError", "no checkpoint in"]),
        ("plain_train_net", ["--resume"], [], ["FileNotFoundError", "no checkpoint in"]),
        ("train_net", [], ["MODEL.WEIGHTS", "no.pth"], ["FileNotFoundError", "no.pth"]),
        (LAZY, [], ["train.init_checkpoint=other.pth"], ["match no parameter"]),
        (LAZY, ["--train-json", "nowhere.json"], [], ["nowhere.json"]),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_one(tool, flags, overrides, words, data, tmp_path):
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    data = data[2:] if "--train-json" in flags else data
    last = mistake(tool, tmp_path, data, 2, flags, overrides)
    assert all(word in last for word in words), last


@pytest.mark.parametrize("tool", TOOLS)
def test_training_on_your_data_needs_no_validation_set(tool, data, tmp_path):
    assert "nothing will be evaluated" in train(tool, tmp_path, data[:4], 2)
    assert (tmp_path / "out/model_final.pth").exists() and (tmp_path / "out/config.yaml").exists()


def test_screen_is_short_and_the_rest_is_in_the_log(data, tmp_path):
    output = tmp_path / "out"
    text = train(LAZY, tmp_path, data, 5, warnings="default")
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
    text = train(LAZY, tmp_path, data, 2)
    assert f"{output} has the results of an earlier run" in text
    text = train(LAZY, tmp_path, data, 2, ["--resume"])
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
    last = mistake(LAZY, tmp_path, yours, 2, overrides=["dataloader.train.num_workers=1"])
    assert last.startswith(f"ValueError: {images}") and "Replace the file" in last


def test_mistakes_of_several_processes_end_in_one_line_whatever_their_class(data, tmp_path):
    (tmp_path / "mistaken.py").write_text(
        "import multiprocessing\nclass Own(ValueError): pass\n"
        "if multiprocessing.parent_process(): raise Own('dear')\n"
    )
    for flags, message in (
        (["--import", "mistaken"], "Own: dear"),
        ([], "A batch of 3 images cannot be shared by 2 processes"),
    ):
        overrides = ["dataloader.train.total_batch_size=3"]
        last = mistake(LAZY, tmp_path, data, 2, ["--num-gpus", "2", *flags], overrides)
        assert message in last


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
    pictures = ["detections.png", "positives.png", "curves.png"]
    for name in (*pictures, "metrics.json", "model_final.pth"):
        assert (tmp_path / "demo" / name).stat().st_size > 0, name


def test_assignments_of_own_images_are_drawn(data, tmp_path):
    tool = "visualize_assignments"
    options = ["--rules", "atss", "iou", "--output", "a.png"]
    run_tool(tool, ["--json", data[5], "--images", data[7], *options], tmp_path)
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
    run_tool(tool, ["--json", "large.json", "--images", large, *options], tmp_path)
    assert cv2.imread(str(tmp_path / "b.png")).shape[1] == 2 * 640 + 4
    text = run_tool(tool, ["--json", data[5]], tmp_path, ok=False)
    assert "--json and --images need each other" in text
