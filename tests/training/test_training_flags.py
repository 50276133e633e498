"""Settings of training runs: evaluation, precision, compilation, devices, processes."""

import argparse
import importlib
import logging
import sys

import pytest
import torch
from atss import tta
from atss.checkpoint import ATSSCheckpointer
from atss.trainer import Trainer
from atss.training import (
    build_model,
    choose_data,
    command_line,
    evaluate_checkpoint,
    evaluation,
    import_modules,
    launch,
    load_lazy_config,
    load_yaml_config,
    loop,
    runs,
    set_up_run,
    settings,
    setup,
    training_parser,
)
from conftest import REPO, make_input, restored_logs, tiny_detector, your_data

from detectron2.engine import DefaultTrainer

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
    return your_data(root, num_train=4, num_val=2, num_classes=2)


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
        assert settings.get_setting(cfg, "train_sets")[0] == "own_train"


@pytest.mark.parametrize("tool", TOOLS)
def test_eval_only_prepares_and_augments_as_the_config_says(tool, data, tmp_path, monkeypatch):
    module = importlib.import_module(tool)
    if tool == "train_net":
        (file, opts), load = YAML, load_yaml_config
        settings = ["TEST.PREPARE.ENABLED", "True", "TEST.PREPARE.PRECISION", "bfloat16",
                    "TEST.AUG.ENABLED", "True", "TEST.AUG.MAX_SIZE", "300",
                    "OUTPUT_DIR", str(tmp_path)]  # fmt: skip
    else:
        (file, opts), load = LAZY, load_lazy_config
        settings = ["train.prepare.enabled=True", "train.prepare.precision=bfloat16",
                    "train.tta.enabled=True", "train.tta.max_size=300",
                    f"train.output_dir={tmp_path}"]  # fmt: skip
    opts = [*opts, *settings]
    args = argparse.Namespace(config_file=file, opts=opts, eval_only=True, resume=True, **data)
    cfg = load(file, opts)
    choose_data(cfg, args)
    model = build_model(cfg)
    assert model.proposal_generator.head.num_classes == 2  # those of the data
    ATSSCheckpointer(model, str(tmp_path)).save("model_final")
    evaluated = []

    def evaluate(model, *_):
        evaluated.append(model)
        return {"bbox": {"AP": float(len(evaluated))}}

    monkeypatch.setattr(evaluation, "inference_on_dataset", evaluate)
    monkeypatch.setattr("detectron2.engine.defaults.inference_on_dataset", evaluate)
    monkeypatch.setattr(module, "set_up_run", lambda *_: None)

    assert module.main(args) == {"bbox": {"AP": 1.0}, "bbox_TTA": {"AP": 2.0}}

    plain, augmented = evaluated
    assert plain.is_prepared_for_inference
    assert plain.backbone.bottom_up.stem.conv1.weight.dtype == torch.bfloat16
    assert augmented.model is plain
    assert augmented.views == tta.release_views(base_size=256, max_size=300)


def test_device_of_the_config_decides_how_workers_talk(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch.choose_backend("cuda") == launch.choose_backend("cuda:0") == "nccl"
    assert launch.choose_backend("cpu") == "gloo"
    spawned = []

    class Ended:
        def __init__(self, *args, nprocs, **kwargs):
            spawned.append(nprocs)

        def pids(self):
            return []

        def join(self):
            return True

    monkeypatch.setattr(launch.multiprocessing, "spawn", Ended)
    launch.launch(print, 2, device="cpu")  # more processes than GPUs, which the CPU allows
    assert spawned == [2]
    with pytest.raises(ValueError, match="2 processes need as many GPUs, this machine has 1"):
        launch.launch(print, 2, device="cuda")

    asked = []
    monkeypatch.setattr(command_line, "launch", lambda *_, device, **__: asked.append(device))
    for (file, opts), load in ((LAZY, load_lazy_config), (YAML, load_yaml_config)):
        options = ["--config-file", file, "--num-gpus", "2", *opts]
        command_line.run(print, training_parser("").parse_args(options), load)
    assert asked == ["cpu", "cpu"]


@pytest.mark.parametrize(
    "options, message",
    [
        ((0,), "at least one process, got --num-gpus 0"),
        ((1, 2, 2), "--machine-rank 2 of --num-machines 2"),
    ],
)
def test_processes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        launch.launch(print, *options)


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.max_iter=1e3", "train.max_iter needs a whole number, such as 1000, got 1000.0"),
        ("train.max_iter=many", "train.max_iter needs a whole number.*got 'many'"),
        ("train.amp.enabled=1", "train.amp.enabled needs true or false, such as True, got 1"),
        ("optimizer.lr=None", "optimizer.lr needs a number, .*null is Python's None"),
        ("train.output_dir=3", "train.output_dir needs text, such as 'output/atss_toy', got 3"),
        ("model.asigner.topk=15", "Unknown config key 'model.asigner.topk'; model has .*assigner"),
        ("model.assigner.tpk=15", "Unknown config key 'model.assigner.tpk'"),
        ("train.max_iter=[", "Override 'train.max_iter=\\[' cannot be read"),
        ("--resume", "--resume comes after an override"),
        ("--num-gpus=2", "--num-gpus=2 comes after an override"),
    ],
)
def test_override_that_does_not_fit_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_lazy_config(LAZY[0], ["model.num_classes=3", override])


def test_override_may_change_what_constructors_take():
    overrides = [
        "model.anchor_generator.offset=0", "model.selector.nms_thresh=1", "model.box_offset=0.5",
        "train.tta.min_sizes=[64]", "model.head.bbox_bias=null", "model.loss.smooth_l1_beta=1",
        "dataloader.train.sampler=RandomSubsetTrainingSampler",
        "dataloader.train.subset_ratio=0.5",
    ]  # fmt: skip
    cfg = load_lazy_config(LAZY[0], overrides)
    assert cfg.model.box_offset == 0.5 and cfg.dataloader.train.subset_ratio == 0.5


def test_unknown_argument_of_the_model_is_a_sentence():
    with pytest.raises(ValueError, match="model.foo is no part of the detector"):
        build_model(load_lazy_config(LAZY[0], ["model.foo=3"]))


def test_options_and_configs_of_the_other_kind_are_refused():
    with pytest.raises(ValueError, match="--resume comes after an override"):
        load_yaml_config(YAML[0], ["SOLVER.MAX_ITER", "3", "--resume"])
    with pytest.raises(ValueError, match="atss_toy.py is a LazyConfig.*lazyconfig_train_net"):
        load_yaml_config(LAZY[0])
    with pytest.raises(ValueError, match="atss_toy.yaml is a YAML config.*tools/train_net.py"):
        load_lazy_config(YAML[0])


def test_nodes_of_parts_take_new_keys_on_the_command_line_and_others_do_not():
    cfg = load_yaml_config(YAML[0], ["MODEL.ATSS.ASSIGNER.MY_KEY", "3", "SEED", "5"])
    assert cfg.MODEL.ATSS.ASSIGNER.MY_KEY == 3 and cfg.SEED == 5
    with pytest.raises(ValueError, match="Unknown config key 'MODEL.ATSS.MY_KEY'"):
        load_yaml_config(YAML[0], ["MODEL.ATSS.MY_KEY", "3"])


@pytest.mark.parametrize(
    "lazy, yaml, processes, message",
    [
        ("train.max_iter=0", ["SOLVER.MAX_ITER", "0"], 1, "iterations >= 1, got 0. Change {}"),
        (
            "dataloader.train.total_batch_size=3",
            ["SOLVER.IMS_PER_BATCH", "3"],
            2,
            "batch of 3 images cannot be shared by 2 processes.*Change {} or --num-gpus",
        ),
    ],
)
def test_schedule_that_cannot_be_is_named_with_its_key(lazy, yaml, processes, message):
    for cfg, key in (
        (load_lazy_config(LAZY[0], [lazy]), lazy.partition("=")[0]),
        (load_yaml_config(YAML[0], yaml), yaml[0]),
    ):
        with pytest.raises(ValueError, match=message.format(key)):
            settings.check_schedule(cfg, processes)


def test_module_to_import_may_lie_in_the_current_folder_and_is_named_where_it_is_not(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "parts_of_mine.py").write_text("print('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    import_modules(["parts_of_mine"])
    assert capsys.readouterr().out == "imported\n"
    with pytest.raises(ValueError, match="--import no_such_module: No module named"):
        import_modules(["no_such_module"])


def test_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    cfg = load_lazy_config(LAZY[0], [f"train.output_dir={tmp_path}/file/out"])
    with pytest.raises(ValueError, match="file/out' cannot be made .*Change train.output_dir"):
        set_up_run(cfg, argparse.Namespace())


def test_hooks_of_a_yaml_run_are_those_of_detectron2(data, tmp_path):
    settings = ["OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "7",
                "SOLVER.CHECKPOINT_PERIOD", "5", "SOLVER.AMP.ENABLED", "False",
                "DATALOADER.NUM_WORKERS", "0", "TEST.PRECISE_BN.ENABLED", "True"]  # fmt: skip
    cfg = load_yaml_config(YAML[0], [*YAML[1], *settings])
    choose_data(cfg, argparse.Namespace(**data))
    trainer = Trainer(cfg)

    replaced = {"CheckpointHook": "PeriodicCheckpointer", "MetricsWriter": "PeriodicWriter"}

    def described(hooks):
        periods = ("period", "_period")
        ours = ("StopHook",)
        names = ((h, type(h).__name__) for h in hooks if h is not None)
        names = [(h, name) for h, name in names if name not in ours]
        return [
            (replaced.get(name, name), *(getattr(h, p, None) for p in periods)) for h, name in names
        ]

    found = described(trainer.build_hooks())
    assert found == described(DefaultTrainer.build_hooks(trainer))
    assert "PreciseBN" in [kind for kind, *_ in found]


def test_a_test_leaves_the_logs_as_they_were(capsys, caplog):
    for message in ("once", "again"):
        with restored_logs():
            assert setup.start_screen().propagate is False
            logging.getLogger("atss.some").info(message)
        logging.getLogger("atss.some").warning("a record")
    shown = capsys.readouterr().out
    assert shown.count("once") == shown.count("again") == 1
    assert caplog.messages == ["a record"] * 2 and not logging.getLogger("atss").handlers


def test_long_messages_and_colours_stay_out_of_what_is_not_for_them():
    plain = logging.Formatter()
    record = logging.LogRecord(
        "detectron2.evaluation", 20, "", 0, "\x1b[31mhead\x1b[0m", None, None
    )
    assert setup._TidyFormatter(plain, True, True).format(record) == record.msg
    assert setup._TidyFormatter(plain, True, False).format(record) == "head"
    assert setup._TidyFormatter(plain, False, True).format(record) == "head"
    record.msg = "Per-category AP:\n" + "nan\n" * 333
    assert setup._TidyFormatter(plain, False, True).format(record) == record.msg
    short = setup._TidyFormatter(plain, True, True).format(record)
    assert short == "Per-category AP: (334 lines, in log.txt)"


def test_plain_loop_saves_no_weights_of_a_loss_that_is_not_finite(data, tmp_path, monkeypatch):
    module = importlib.import_module("plain_train_net")
    settings = ["train.max_iter=4", "train.checkpointer.period=2", "train.log_period=3",
                f"train.output_dir={tmp_path}", "optimizer.lr=1e30"]  # fmt: skip
    cfg = load_lazy_config(LAZY[0], [*LAZY[1], *settings])
    choose_data(cfg, argparse.Namespace(**data))
    with pytest.raises(FloatingPointError, match="iteration 1"):
        module.do_train(cfg, resume=False)
    assert not list(tmp_path.glob("model*.pth"))


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


def test_saved_config_that_asks_for_objects_is_refused_and_runs_nothing(tmp_path):
    evil = tmp_path / "config.yaml"
    mark = tmp_path / "ran"
    evil.write_text(f"model: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ValueError, match="could run code; use the .py config"):
        load_lazy_config(str(evil))
    assert not mark.exists()
