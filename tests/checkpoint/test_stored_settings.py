"""Geometry in the state dict: every loader applies it, for one-stage and two-stage models."""

import copy
import logging
import os
import pickle

import pytest
import torch
from atss.backbone import resnet_fpn
from atss.checkpoint import (
    OVERRIDES_KEY,
    ATSSCheckpointer,
    convert_checkpoint,
    load_or_resume,
    override_weights,
)
from atss.inference_mode import prepare_for_inference
from atss.model_zoo import get_config
from atss.postprocessing import DetectionSelector
from atss.stored_settings import STATE_KEY, settings_of
from atss.training.launch import _free_port
from conftest import make_input, tiny_detector
from torch import distributed as dist
from torch import multiprocessing

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate


def author_like(**changes):
    """A detector whose geometry differs from the defaults in every setting."""
    model = tiny_detector(
        backbone=resnet_fpn(
            50, norm="FrozenBN", freeze_at=0, stem_out_channels=32, res2_out_channels=32,
            out_channels=64, stride_in_1x1=False, relu_before_p7=False, frozen_bn_eps=0.0,
        ),
        box_offset=0.5,
        selector=DetectionSelector(sqrt_score=False),
        pixel_mean=[1.0, 2.0, 3.0],
        pixel_std=[4.0, 5.0, 6.0],
        **changes,
    )  # fmt: skip
    model.proposal_generator.anchor_generator.offset = 0.0
    return model.eval()


def default_like(**changes):
    backbone = resnet_fpn(
        50, norm="FrozenBN", freeze_at=0, stem_out_channels=32, res2_out_channels=32,
        out_channels=64,
    )  # fmt: skip
    return tiny_detector(backbone=backbone, **changes).eval()


def without_settings(weights):
    """A state dict as version 0.1 wrote it."""
    return {
        name: value
        for name, value in weights.items()
        if not name.endswith(STATE_KEY) and not name.startswith("pixel_")
    }


def load_plain(model, path):
    model.load_state_dict(torch.load(path, weights_only=True)["model"])


LOADERS = {
    "plain": load_plain,
    "detectron2": lambda model, path: DetectionCheckpointer(model).load(path),
    "ours": lambda model, path: ATSSCheckpointer(model).load(path),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
def test_every_loader_applies_the_geometry_of_the_weights(loader, input_format, tmp_path):
    trained, model = author_like(input_format=input_format), default_like()
    torch.nn.init.normal_(trained.proposal_generator.head.cls_logits.weight, std=0.3)
    ATSSCheckpointer(trained, str(tmp_path)).save("a")
    LOADERS[loader](model, str(tmp_path / "a.pth"))

    turned = input_format == "RGB"
    expected = {**settings_of(trained), "model.input_format": "BGR"}
    for key in ("model.pixel_mean", "model.pixel_std"):
        expected[key] = expected[key][:: -1 if turned else 1]
    assert settings_of(model) == expected
    image = make_input()["image"]
    inputs = [{"image": image.flip(0) if turned else image}]
    with torch.no_grad():
        theirs, ours = trained([{"image": image}])[0], model(inputs)[0]
    assert len(theirs["instances"]) > 0
    torch.testing.assert_close(
        ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor
    )


def test_settings_are_no_parameter_and_survive_copies_casts_and_preparation():
    model = author_like()
    names = [name for name, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]
    assert not [name for name in names if STATE_KEY in name]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.half().float()):
        assert settings_of(other) == settings_of(model)
    prepared = prepare_for_inference(model)
    assert prepared.proposal_generator.box_offset == 0.5
    state = model.state_dict()
    for name in (STATE_KEY, f"backbone.{STATE_KEY}", f"proposal_generator.{STATE_KEY}"):
        assert state[name].shape == (8,) and state[name].dtype == torch.float64
        assert bool(state[name].isfinite().all())


def test_weights_of_version_0_1_load_with_the_geometry_of_the_config_and_it_is_said_once(caplog):
    model = author_like()
    weights = without_settings(model.state_dict())
    with caplog.at_level(logging.WARNING, logger="atss"):
        model.load_state_dict(weights)  # strictly
    assert model.proposal_generator.box_offset == 0.5
    assert caplog.text.count("do not keep the geometry") == 1


def test_overrides_of_version_0_1_are_applied_without_that_warning(tmp_path, caplog):
    overrides = {"model.box_offset": 0.5, "model.pixel_mean": [7.0, 8.0, 9.0]}
    content = {"model": without_settings(default_like().state_dict()), OVERRIDES_KEY: overrides}
    torch.save(content, tmp_path / "old.pth")
    model = default_like()
    with caplog.at_level(logging.WARNING, logger="atss"):
        ATSSCheckpointer(model, str(tmp_path)).load(str(tmp_path / "old.pth"))
    assert settings_of(model)["model.box_offset"] == 0.5
    assert settings_of(model)["model.pixel_mean"] == [7.0, 8.0, 9.0]
    assert "geometry" not in caplog.text


def test_weights_of_a_newer_version_are_refused():
    weights = default_like().state_dict()
    weights[f"proposal_generator.{STATE_KEY}"][0] = 2
    with pytest.raises(ValueError, match="version 2, this atss knows version 1"):
        default_like().load_state_dict(weights)


def test_a_convolution_that_cannot_be_turned_is_refused():
    weights = author_like(input_format="RGB").state_dict()
    with pytest.raises(ValueError, match="want RGB images, the model takes L"):
        default_like(input_format="L").load_state_dict(weights)


def test_converted_weights_of_a_backbone_alone_leave_the_rest_to_the_config():
    weights = convert_checkpoint(author_like().state_dict(), target="mmdet").state_dict
    weights = {n[len("backbone.") :]: v for n, v in weights.items() if n.startswith("backbone.")}
    converted = convert_checkpoint(weights)
    model = default_like(box_offset=0.25)
    model.backbone.top_block.relu_before_p7 = False
    filled = override_weights(converted.state_dict, converted.overrides)
    model.load_state_dict(filled, strict=False)
    found = settings_of(model)
    assert found["model.box_offset"] == 0.25 and found["model.backbone.relu_before_p7"] is False
    assert found["model.backbone.stride_in_1x1"] is False
    assert found["model.pixel_mean"] == pytest.approx([103.53, 116.28, 123.675])


@pytest.mark.parametrize("loader", LOADERS)
def test_both_stages_of_a_two_stage_model_get_their_geometry(loader, tmp_path):
    cfg = get_config("toy/faster_rcnn_atss_toy")
    trained, model = instantiate(cfg.model), instantiate(cfg.model)
    core = trained.proposal_generator
    core.box_offset, core.anchor_generator.offset = 0.5, 0.0
    trained.backbone.top_block.relu_before_p7 = False
    trained.pixel_mean.fill_(3.0)
    ATSSCheckpointer(trained, str(tmp_path)).save("a")
    LOADERS[loader](model, str(tmp_path / "a.pth"))
    assert model.proposal_generator.box_offset == 0.5
    assert model.proposal_generator.anchor_generator.offset == 0.0
    assert model.backbone.top_block.relu_before_p7 is False
    # The model itself is Detectron2's class, so that its pixel statistics need our checkpointer.
    if loader == "ours":
        assert model.pixel_mean.flatten().tolist() == [3.0] * 3


def _load_a(rank, folder, port):
    os.chdir(f"{folder}/{rank}")
    group = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    model = default_like()
    loaded = load_or_resume(ATSSCheckpointer(model), "a.pth", resume=False)
    assert loaded.changes["model.box_offset"] == 0.5 and loaded.class_names == ["x", "y", "z"]
    total = sum(value.double().sum() for value in model.parameters())
    torch.save((settings_of(model), total), f"{folder}/result_{rank}.pt")
    dist.destroy_process_group()


def test_workers_that_do_not_see_the_file_get_it_from_the_main_worker(tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    ATSSCheckpointer(author_like(), str(tmp_path / "0"), class_names=["x", "y", "z"]).save("a")
    multiprocessing.spawn(_load_a, (str(tmp_path), _free_port()), nprocs=2)
    results = [torch.load(tmp_path / f"result_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert results[0] == results[1] and results[0][0]["model.box_offset"] == 0.5
