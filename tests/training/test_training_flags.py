"""Flags of the training tools: precision, compilation, devices, what --eval-only evaluates."""

import argparse

import pytest
import torch
from atss import trainer
from atss.checkpoint import checkpointer
from atss.data import ToyShapesOptions
from atss.data.toy_shapes import render_dataset, split_paths
from atss.model_zoo import get_config
from atss.training import launch
from atss.training import lazy_config as lazy_training
from atss.training import loop as training_loop
from atss.training.yaml_config import load_yaml_config
from conftest import REPO, make_input, tiny_detector

plain_train_net = pytest.importorskip("plain_train_net")


def small_config(output, *overrides):
    cfg = get_config("toy/atss_toy")
    return lazy_training.apply_overrides(
        cfg,
        [
            "model.backbone.stem_out_channels=32",
            "model.backbone.norm=GN",
            "model.head.num_convs=1",
            "dataloader.train.total_batch_size=2",
            "dataloader.train.num_workers=0",
            "dataloader.test.num_workers=0",
            "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
            "dataloader.test.mapper.augmentations.0.short_edge_length=64",
            "train.device=cpu",
            "train.amp.enabled=False",
            "train.eval_period=0",
            f"train.output_dir={output}",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    options = ToyShapesOptions(
        image_size=64, num_train=4, num_val=2, max_size=40, num_classes=2, max_objects=3
    )
    folder = render_dataset(root, options)
    paths = {split: split_paths(folder, split) for split in ("train", "val")}
    return argparse.Namespace(
        train_json=str(paths["train"].json_file),
        train_images=str(paths["train"].image_root),
        val_json=str(paths["val"].json_file),
        val_images=str(paths["val"].image_root),
        eval_only=False,
        opts=[],
    )


def test_evaluating_without_weights_is_refused_with_both_ways_out(tmp_path):
    message = "--eval-only has no weights.*train.init_checkpoint.*MODEL.WEIGHTS.*--resume"
    with pytest.raises(ValueError, match=message):
        lazy_training.evaluate_checkpoint(small_config(tmp_path))
    cfg = load_yaml_config(str(REPO / "configs/toy/atss_toy.yaml"), ["OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(ValueError, match=message):
        trainer.Trainer.evaluate_checkpoint(cfg)


@pytest.mark.parametrize("tool", ["plain_train_net", "lazyconfig_train_net"])
def test_eval_only_prepares_and_augments_as_the_config_says(tool, data, tmp_path, monkeypatch):
    main = pytest.importorskip(tool).main
    cfg = small_config(tmp_path, "train.prepare.enabled=True", "train.tta.enabled=True")
    model = lazy_training.build_model(cfg)
    checkpointer.ATSSCheckpointer(model, str(tmp_path)).save("model_final")
    monkeypatch.setattr(pytest.importorskip(tool), "load_lazy_config", lambda *_: cfg)
    monkeypatch.setattr(pytest.importorskip(tool), "default_setup", lambda *_: None)
    monkeypatch.setattr(pytest.importorskip(tool), "choose_data", lambda *_: None)
    seen = []
    monkeypatch.setattr(lazy_training, "evaluate_lazy_with_tta", lambda _, m: seen.append(m))
    args = argparse.Namespace(config_file="", opts=[], eval_only=True, resume=True)
    main(args)
    assert seen[0].is_prepared_for_inference


def test_yaml_keys_prepare_the_model_that_is_evaluated(tmp_path, monkeypatch):
    overrides = ["OUTPUT_DIR", str(tmp_path), "TEST.PREPARE.ENABLED", "True",
                 "TEST.PREPARE.PRECISION", "bfloat16", "MODEL.DEVICE", "cpu"]  # fmt: skip
    cfg = load_yaml_config(str(REPO / "configs/toy/atss_toy.yaml"), overrides)
    model = trainer.Trainer.build_model(cfg)
    checkpointer.ATSSCheckpointer(model, str(tmp_path)).save("model_final")
    seen = []
    monkeypatch.setattr(trainer.Trainer, "test", lambda cfg, model: seen.append(model) or {})
    trainer.Trainer.evaluate_checkpoint(cfg, resume=True)
    assert seen[0].is_prepared_for_inference
    assert seen[0].backbone.bottom_up.stem.conv1.weight.dtype == torch.bfloat16


def test_device_of_the_config_decides_how_workers_talk(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch.choose_backend("cuda") == launch.choose_backend("cuda:0") == "nccl"
    assert launch.choose_backend("cpu") == "gloo"
    spawned = []
    monkeypatch.setattr(
        launch.multiprocessing, "spawn", lambda *args, **kwargs: spawned.append(kwargs["nprocs"])
    )
    launch.launch(print, 2, device="cpu")  # more processes than GPUs, which the CPU does not mind
    assert spawned == [2]
    with pytest.raises(ValueError, match="2 processes need as many GPUs, this machine has 1"):
        launch.launch(print, 2, device="cuda")


@pytest.mark.parametrize("tool", ["train_net", "lazyconfig_train_net", "plain_train_net"])
def test_tools_read_the_device_from_config_and_overrides(tool):
    module = pytest.importorskip(tool)
    is_yaml = tool == "train_net"
    file = REPO / "configs/toy" / ("atss_toy.yaml" if is_yaml else "atss_toy.py")
    opts = ["MODEL.DEVICE", "cpu"] if is_yaml else ["train.device=cpu"]
    args = argparse.Namespace(config_file=str(file), opts=opts)
    assert module.device_of(args) == "cpu"


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


def test_plain_loop_saves_and_restores_the_gradient_scaler(data, tmp_path, monkeypatch):
    scalers = []

    def make(dtype):
        scalers.append(FakeScaler())
        return scalers[-1]

    monkeypatch.setattr(plain_train_net, "make_grad_scaler", make)
    monkeypatch.setattr(plain_train_net, "evaluate_lazy", lambda *_: None)
    cfg = small_config(tmp_path, "train.max_iter=2", "train.checkpointer.period=2")
    lazy_training.choose_data(cfg, data)
    plain_train_net.do_train(cfg, resume=False)
    assert scalers[0].updates == 2
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert saved["grad_scaler"] == {"updates": 2}

    cfg.train.max_iter = 3
    plain_train_net.do_train(cfg, resume=True)
    assert scalers[1].updates == 3


def test_only_float16_scales_gradients():
    assert training_loop.make_grad_scaler(None) is None
    assert training_loop.make_grad_scaler(torch.bfloat16) is None
    scaler = training_loop.make_grad_scaler(torch.float16)
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
