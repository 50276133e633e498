"""tools/compare.py: equal conditions, results, and what is refused before training."""

import json

import _reference_models
import compare
import pytest
import torch
from atss.model_zoo import get_config
from conftest import make_input

from detectron2.config import instantiate
from detectron2.modeling.meta_arch.retinanet import RetinaNet

METRICS = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 12.34)


def run(arguments):
    compare.main(compare.parse_arguments(arguments))


@pytest.fixture
def trained(monkeypatch):
    """Configs that would be trained; nothing is."""
    configs = []
    monkeypatch.setattr(compare, "register_toy_shapes", lambda: None)
    monkeypatch.setattr(
        compare, "train_for", lambda cfg, *_: configs.append(cfg) or (torch.nn.Identity(), 7, 1.0)
    )
    monkeypatch.setattr(compare, "evaluate_lazy", lambda *_: {"bbox": METRICS})
    monkeypatch.setattr(compare, "train_lazy", lambda cfg: configs.append(cfg) or {"bbox": METRICS})
    monkeypatch.setattr(compare, "build_model", lambda _: torch.nn.Identity())
    monkeypatch.setattr(compare.ATSSCheckpointer, "load", lambda *_: None)
    monkeypatch.setattr(compare, "proposal_recall", lambda *_: {"AR@100": 50.0, "AR@1000": 60.0})
    return configs


def test_fcos_that_detectron2_does_not_have_is_refused_before_anything_is_trained(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "has_fcos", lambda: False)
    output = ["--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="has no FCOS, only its main branch does.* --models ATSS"):
        run(["detectors", "--models", "ATSS", "FCOS", *output])
    assert trained == []

    run(["detectors", *output])  # asked for by nobody: skipped, and said
    assert len(trained) == 2 and "FCOS is skipped: Detectron2" in capsys.readouterr().out


def test_detectors_have_equal_backbones_and_their_results_are_written(trained, tmp_path, capsys):
    names = ["ATSS", "RetinaNet"] + ["FCOS"] * _reference_models.has_fcos()
    overrides = ["model.num_classes=3", "model.backbone.out_channels=32"]
    run(["detectors", *overrides, "--seconds", "1", "--output", str(tmp_path / "new")])
    assert all(cfg.model.backbone == trained[0].model.backbone for cfg in trained)
    assert [cfg.model.num_classes for cfg in trained] == [3] * len(names)
    assert {cfg.dataloader.train.mapper.image_format for cfg in trained} == {"BGR"}
    rows = json.loads((tmp_path / "new/results.json").read_text())
    assert [row["model"] for row in rows] == names
    assert rows[0]["iterations"] == 7 and rows[0]["AP50"] == 12.3
    table = (tmp_path / "new/table.md").read_text()
    assert "seconds 1.0" in table and table.count("| 12.3 ") == 6 * len(names)
    assert "| RetinaNet |" in capsys.readouterr().out


def test_first_stages_differ_in_nothing_else(trained, tmp_path):
    arguments = ["proposals", "--iterations", "5", "--batch-size", "2", "--seed", "3"]
    run([*arguments, "--output", str(tmp_path)])
    rpn, atss = trained
    assert [cfg.model.proposal_generator._target_.__name__ for cfg in trained] == ["RPN", "ATSS"]
    for cfg in trained:
        assert (cfg.train.max_iter, cfg.train.seed) == (5, 3)
        assert cfg.dataloader.train.total_batch_size == 2
        del cfg.model.proposal_generator, cfg.train.output_dir
    assert rpn == atss
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["first stage"], row["AR@100"], row["AP"]) for row in rows] == [
        ("RPN", 50.0, 12.3),
        ("ATSS", 50.0, 12.3),
    ]


def test_rpn_proposes_as_many_boxes_as_atss():
    cfg = get_config("toy/faster_rcnn_atss_toy")
    selector = cfg.model.proposal_generator.selector
    cfg.model.proposal_generator = compare.rpn(selector)
    rpn = instantiate(cfg.model).proposal_generator
    assert rpn.pre_nms_topk == {True: selector.pre_nms_topk[0], False: selector.pre_nms_topk[1]}
    assert rpn.post_nms_topk == {True: selector.post_nms_topk[0], False: selector.post_nms_topk[1]}
    assert rpn.nms_thresh == selector.nms_thresh


def test_training_for_a_time_trains_retinanet_in_bfloat16_and_stops(monkeypatch):
    cfg = get_config("toy/atss_toy")
    cfg.model = compare.retinanet(cfg.model)
    cfg.train.device, cfg.train.amp.precision = "cpu", "bfloat16"
    batch = [make_input(64, 64, [[8.0, 8, 40, 48]], [1])]
    real = compare.instantiate
    loader = cfg.dataloader.train
    monkeypatch.setattr(
        compare, "instantiate", lambda node: iter([batch] * 99) if node is loader else real(node)
    )
    model, iterations, seconds = compare.train_for(cfg, 0.2, torch.device("cpu"))
    assert isinstance(model, RetinaNet) and 1 <= iterations < 98 and seconds >= 0.2
    assert next(model.parameters()).grad.isfinite().all()
