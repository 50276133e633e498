"""Settings of training runs: evaluation, precision, compilation, devices, processes."""

import argparse
import importlib

import pytest
import torch
from atss import tta
from atss.checkpoint import ATSSCheckpointer
from atss.data import ToyShapesOptions
from atss.data.toy_shapes import render_dataset, split_paths
from atss.trainer import Trainer
from atss.training import (
    build_model,
    choose_data,
    configs,
    evaluate_checkpoint,
    launch,
    load_lazy_config,
    load_yaml_config,
    loop,
    runs,
)
from conftest import REPO, make_input, tiny_detector

TOOLS = ["train_net", "lazyconfig_train_net", "plain_train_net"]
LAZY = (
    str(REPO / "configs/toy/atss_toy.py"),
    [
        "model.backbone.stem_out_channels=32", "model.backbone.norm=GN", "model.head.num_convs=1",
        "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "train.device=cpu", "train.amp.enabled=False", "train.eval_period=0",
    ],
)  # fmt: skip
YAML = (str(REPO / "configs/toy/atss_toy.yaml"), ["MODEL.DEVICE", "cpu"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options for your data: a set of six images with two classes."""
    root = tmp_path_factory.mktemp("shapes")
    options = ToyShapesOptions(
        image_size=64, num_train=4, num_val=2, max_size=40, num_classes=2, max_objects=3
    )
    folder = render_dataset(root, options)
    paths = {split: split_paths(folder, split) for split in ("train", "val")}
    return {
        "train_json": str(paths["train"].json_file),
        "train_images": str(paths["train"].image_root),
        "val_json": str(paths["val"].json_file),
        "val_images": str(paths["val"].image_root),
    }


def test_evaluating_without_weights_is_refused_with_both_ways_out():
    for evaluate, cfg in (
        (evaluate_checkpoint, load_lazy_config(*LAZY)),
        (Trainer.evaluate_checkpoint, load_yaml_config(*YAML)),
    ):
        with pytest.raises(
            ValueError,
            match="--eval-only has no weights.*train.init_checkpoint.*MODEL.WEIGHTS.*--resume",
        ):
            evaluate(cfg)


@pytest.mark.parametrize("name", ["atss_toy", "faster_rcnn_atss_toy"])
def test_both_kinds_of_config_take_your_data_and_its_classes(name, data):
    for load, suffix in ((load_lazy_config, ".py"), (load_yaml_config, ".yaml")):
        cfg = load(str(REPO / "configs/toy" / name) + suffix)
        choose_data(cfg, argparse.Namespace(**data))
        model = build_model(cfg)
        final = model.roi_heads if "rcnn" in name else model.proposal_generator.head
        assert final.num_classes == 2
        assert configs.get_setting(cfg, "train_sets")[0] == "own_train"


@pytest.mark.parametrize("tool", TOOLS)
def test_eval_only_prepares_and_augments_as_the_config_says(tool, data, tmp_path, monkeypatch):
    module = importlib.import_module(tool)
    if tool == "train_net":
        (file, opts), load = YAML, load_yaml_config
        settings = ["TEST.PREPARE.ENABLED", "True", "TEST.PREPARE.PRECISION", "bfloat16",
                    "TEST.AUG.ENABLED", "True", "OUTPUT_DIR", str(tmp_path)]  # fmt: skip
    else:
        (file, opts), load = LAZY, load_lazy_config
        settings = ["train.prepare.enabled=True", "train.prepare.precision=bfloat16",
                    "train.tta.enabled=True", f"train.output_dir={tmp_path}"]  # fmt: skip
    opts = [*opts, *settings]
    args = argparse.Namespace(config_file=file, opts=opts, eval_only=True, resume=True, **data)
    assert module.device_of(args) == "cpu"
    cfg = load(file, opts)
    choose_data(cfg, args)
    model = build_model(cfg)
    assert model.proposal_generator.head.num_classes == 2  # those of the data
    ATSSCheckpointer(model, str(tmp_path)).save("model_final")
    evaluated = []

    def evaluate(model, *_):
        evaluated.append(model)
        return {"bbox": {"AP": float(len(evaluated))}}

    monkeypatch.setattr(runs, "inference_on_dataset", evaluate)
    monkeypatch.setattr("detectron2.engine.defaults.inference_on_dataset", evaluate)
    monkeypatch.setattr(module, "default_setup", lambda *_: None)

    assert module.main(args) == {"bbox": {"AP": 1.0}, "bbox_TTA": {"AP": 2.0}}

    plain, augmented = evaluated
    assert plain.is_prepared_for_inference
    assert plain.backbone.bottom_up.stem.conv1.weight.dtype == torch.bfloat16
    assert augmented.model is plain
    assert augmented.views == tta.release_views(base_size=256)


def test_device_of_the_config_decides_how_workers_talk(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch.choose_backend("cuda") == launch.choose_backend("cuda:0") == "nccl"
    assert launch.choose_backend("cpu") == "gloo"
    spawned = []
    monkeypatch.setattr(
        launch.multiprocessing, "spawn", lambda *args, **kwargs: spawned.append(kwargs["nprocs"])
    )
    launch.launch(print, 2, device="cpu")  # more processes than GPUs, which the CPU allows
    assert spawned == [2]
    with pytest.raises(ValueError, match="2 processes need as many GPUs, this machine has 1"):
        launch.launch(print, 2, device="cuda")


class FakeScaler:
    """Counts its updates, as a scaler keeps its factor; a real one needs a GPU."""

    def __init__(self):
        self.updates = 0

    def scale(self, loss):
        return loss

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        self.updates += 1

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


@pytest.mark.parametrize("kind", ["plain", "hooks"])
def test_the_gradient_scaler_is_saved_and_restored(kind, data, tmp_path, monkeypatch):
    scalers = []

    def make(dtype):
        scalers.append(FakeScaler())
        return scalers[-1]

    module = importlib.import_module("plain_train_net") if kind == "plain" else runs
    monkeypatch.setattr(module if kind == "plain" else loop, "make_grad_scaler", make)
    monkeypatch.setattr(module, "evaluate_lazy", lambda *_: None)
    train = module.do_train if kind == "plain" else module.train_lazy
    file, opts = LAZY
    settings = ["train.max_iter=2", "train.checkpointer.period=2", f"train.output_dir={tmp_path}"]
    cfg = load_lazy_config(file, [*opts, *settings])
    choose_data(cfg, argparse.Namespace(**data))
    train(cfg, resume=False)
    assert scalers[0].updates == 2
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert saved.get("trainer", saved)["grad_scaler"] == {"updates": 2}

    cfg.train.max_iter = 3
    train(cfg, resume=True)
    assert scalers[1].updates == 3


def test_only_float16_scales_gradients():
    assert loop.make_grad_scaler(None) is None
    assert loop.make_grad_scaler(torch.bfloat16) is None
    scaler = loop.make_grad_scaler(torch.float16)
    assert scaler.state_dict is not None


def test_channels_last_and_bfloat16_train_to_the_same_losses():
    torch.manual_seed(0)
    model = tiny_detector()
    batch = [make_input(64, 64, [[5, 5, 40, 40]], [1])]
    expected = model(batch)
    model.to(memory_format=torch.channels_last)
    for name, loss in model(batch).items():
        torch.testing.assert_close(loss, expected[name], atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], atol=0.02, rtol=0.05)
