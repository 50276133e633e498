"""Weights of runs: classes and geometry agree with data and config, and a run's folder has both."""

import argparse
import json
import logging
from pathlib import Path

import export_model
import pytest
import torch
from atss.checkpoint import ATSSCheckpointer, convert_checkpoint, override_weights, read_checkpoint
from atss.trainer import Trainer
from atss.training import (
    build_model,
    choose_data,
    evaluate_checkpoint,
    evaluation,
    load_lazy_config,
    load_yaml_config,
    set_up_run,
    train_lazy,
)
from atss.training.saved_configs import compare_with_saved, save_config
from atss.training.settings import put_setting
from conftest import REPO, your_data

from detectron2.data import DatasetCatalog, MetadataCatalog

LAZY = [
    "model.backbone.stem_out_channels=32", "model.backbone.norm=GN", "model.head.num_convs=1",
    "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0", "train.max_iter=1",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "train.device=cpu", "train.amp.enabled=False", "train.eval_period=0",
]  # fmt: skip
YAML = [
    "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.AMP.ENABLED", "False", "SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options for your data: a set of six images with two classes."""
    root = tmp_path_factory.mktemp("shapes")
    return your_data(root, num_train=4, num_val=2, num_classes=2)


@pytest.fixture(autouse=True)
def registered_anew():
    yield
    for name in ("own_train", "own_val"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def load(kind, output, data, *overrides):
    if kind == "yaml":
        options = [*YAML, "OUTPUT_DIR", str(output), *overrides]
        cfg = load_yaml_config(str(REPO / "configs/toy/atss_toy.yaml"), options)
    else:
        options = [*LAZY, f"train.output_dir={output}", *overrides]
        cfg = load_lazy_config(str(REPO / "configs/toy/atss_toy.py"), options)
    choose_data(cfg, argparse.Namespace(opts=options, **data))
    return cfg


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def train(kind, cfg, output, resume=False):
    output.mkdir(exist_ok=True)
    save_config(cfg, str(output / "config.yaml"))  # as Detectron2's default_setup does
    if kind == "lazy":
        return train_lazy(cfg, resume)
    cfg.freeze()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer.train()


def evaluate(kind, cfg, monkeypatch, **options):
    monkeypatch.setattr(evaluation, "inference_on_dataset", lambda *_: {"bbox": {"AP": 1.0}})
    monkeypatch.setattr(
        "detectron2.engine.defaults.inference_on_dataset", lambda *_: {"bbox": {"AP": 1.0}}
    )
    if kind == "lazy":
        return evaluate_checkpoint(cfg, **options)
    return Trainer.evaluate_checkpoint(cfg, **options)


def with_categories(data, folder, change):
    """The data with other categories in the validation file."""
    content = json.loads(Path(data["val_json"]).read_text())
    content["categories"] = change(content["categories"])
    (folder / "val.json").write_text(json.dumps(content))
    return {"val_json": str(folder / "val.json"), "val_images": data["val_images"]}


def swapped(categories):
    first, second = (category["name"] for category in categories)
    return [{**c, "name": name} for c, name in zip(categories, (second, first))]


@pytest.mark.parametrize("kind", ["lazy", "yaml"])
def test_evaluation_compares_the_names_of_the_classes(kind, data, tmp_path, monkeypatch, caplog):
    cfg = load(kind, tmp_path / "run", data)
    train(kind, cfg, tmp_path / "run")
    names = list(MetadataCatalog.get("own_train").thing_classes)
    assert read_checkpoint(str(tmp_path / "run" / "model_final.pth"))["class_names"] == names
    assert evaluate(kind, cfg, monkeypatch, resume=True)["bbox"]["AP"] == 1.0
    for name in ("own_train", "own_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

    other = with_categories(data, tmp_path, swapped)
    cfg = load(kind, tmp_path / "run", {**other, "eval_only": True})
    with pytest.raises(ValueError, match=f"The weights and own_val.*class 0 is '{names[0]}'"):
        evaluate(kind, cfg, monkeypatch, resume=True)

    content = torch.load(tmp_path / "run" / "model_final.pth", weights_only=False)
    torch.save({"model": content["model"]}, tmp_path / "nameless.pth")
    put_setting(cfg, "weights", str(tmp_path / "nameless.pth"))
    with caplog.at_level(logging.WARNING, logger="atss"):
        evaluate(kind, cfg, monkeypatch)
    assert caplog.text.count("do not name their classes: only their number") == 1


@pytest.mark.parametrize("kind", ["lazy", "yaml"])
def test_evaluation_refuses_weights_that_fit_in_part(kind, data, tmp_path, monkeypatch):
    cfg = load(kind, tmp_path, data)
    ATSSCheckpointer(build_model(cfg), str(tmp_path)).save("model_final")
    put_setting(cfg, "num_classes", 7)
    with pytest.raises(ValueError, match="not those of this model.*of another shape"):
        evaluate(kind, cfg, monkeypatch, resume=True)


@pytest.mark.parametrize("kind", ["lazy", "yaml"])
def test_the_saved_config_of_a_run_has_the_geometry_of_its_weights(kind, data, tmp_path):
    cfg = load(kind, tmp_path / "run", data)
    weights = convert_checkpoint(build_model(cfg).state_dict(), target="author").state_dict
    torch.save({"model": weights}, tmp_path / "author.pth")
    put_setting(cfg, "weights", str(tmp_path / "author.pth"))
    train(kind, cfg, tmp_path / "run")
    if kind == "lazy":
        saved = load_lazy_config(str(tmp_path / "run"))
        assert saved.model.box_offset == cfg.model.box_offset == 0.5
    else:
        saved = load_yaml_config(str(tmp_path / "run"))
        assert saved.MODEL.ATSS.BOX_OFFSET == cfg.MODEL.ATSS.BOX_OFFSET == 0.5
    model = build_model(saved)
    assert model.pixel_mean.flatten().tolist() == pytest.approx([102.9801, 115.9465, 122.7717])


@pytest.mark.parametrize(
    "kind, override",
    [
        ("lazy", ["train.init_checkpoint=detectron2://gone.pkl"]),
        ("yaml", ["MODEL.WEIGHTS", "detectron2://gone.pkl"]),
    ],
)
def test_missing_weights_are_named_before_training(kind, override, data, tmp_path, monkeypatch):
    cfg = load(kind, tmp_path / "out", data, *override)

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("atss.checkpoint.files.PathManager.get_local_path", refuse)
    with pytest.raises(ValueError, match="Cannot get detectron2://gone.pkl .*no route to host"):
        set_up_run(cfg, argparse.Namespace())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, warned, refused",
    [
        ("lazy", ["optimizer.lr=0.5"], ["optimizer._target_=torch.optim.SGD"]),
        ("yaml", ["SOLVER.BASE_LR", "0.5"], ["SOLVER.OPTIMIZER", "SGD"]),
    ],
)
def test_resuming_says_what_differs_from_before(kind, warned, refused, data, tmp_path, caplog):
    save_config(load(kind, tmp_path, data), str(tmp_path / "config.yaml"))
    with caplog.at_level(logging.WARNING, logger="atss"):
        compare_with_saved(load(kind, tmp_path, data))
        assert warnings_of(caplog) == []
        compare_with_saved(load(kind, tmp_path, data, *warned))
    (message,) = warnings_of(caplog)
    assert "was 0.001, is 0.5" in message and "learning rate" in message
    with pytest.raises(ValueError, match="--resume continues.*AdamW.*SGD.*start without --resume"):
        compare_with_saved(load(kind, tmp_path, data, *refused))
    cfg = load(kind, tmp_path, data)
    put_setting(cfg, "num_classes", 5)
    with pytest.raises(ValueError, match="(?i)num_classes was 2, is 5"):
        compare_with_saved(cfg)


@pytest.mark.parametrize("kind", ["lazy", "yaml"])
def test_the_folder_of_a_run_is_all_that_export_needs(kind, data, tmp_path, capsys):
    run = tmp_path / "run"
    cfg = load(kind, run, data)
    train(kind, cfg, run)
    output = ["--format", "torchscript", "--output", str(tmp_path / "a.pt")]
    assert export_model.main(["--config-file", str(run), "--weights", str(run), *output]) == 0
    names = json.loads((tmp_path / "a.pt.json").read_text())["class_names"]
    assert names == list(MetadataCatalog.get("own_train").thing_classes)

    toy = str(REPO / "configs/toy" / ("atss_toy.py" if kind == "lazy" else "atss_toy.yaml"))
    assert export_model.main(["--config-file", toy, "--weights", str(run), *output]) == 1
    assert "not those of this model" in capsys.readouterr().err

    nameless = override_weights(read_checkpoint(str(run / "model_final.pth"))["model"], {})
    torch.save({"model": nameless}, tmp_path / "nameless.pth")
    weights = ["--weights", str(tmp_path / "nameless.pth")]
    assert export_model.main(["--config-file", str(run), *weights, *output]) == 0
    assert json.loads((tmp_path / "a.pt.json").read_text())["class_names"] is None
