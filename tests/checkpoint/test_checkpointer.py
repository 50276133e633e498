"""Loading: foreign weights through the checkpointer and by name, and the conversion tool."""

import copy
import hashlib
import logging
import os

import pytest
import torch
from atss import model_zoo
from atss.backbone import resnet_fpn
from atss.checkpoint import (
    OVERRIDES_KEY,
    ATSSCheckpointer,
    CheckpointError,
    convert_checkpoint,
    fetch,
    load_or_resume,
    read_checkpoint,
    require_weights,
)
from atss.inference_mode import prepare_for_inference
from atss.postprocessing import DetectionSelector
from conftest import make_input, tiny_detector
from convert_checkpoint import main as convert_tool

from detectron2.checkpoint import DetectionCheckpointer


def save_as(model, source, path):
    """The weights of a model in a file as another code base would write it."""
    weights = convert_checkpoint(model.state_dict(), target=source).state_dict
    if source == "author":
        torch.save({"model": {f"module.{k}": v for k, v in weights.items()}}, path)
    else:
        torch.save({"meta": {"epoch": 12}, "state_dict": weights}, path)
    return str(path)


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def assert_detect_the_same(model, inputs, other, other_inputs, rtol=None, atol=None, pixels=None):
    with torch.no_grad():
        found, expected = (
            m.eval()([i])[0]["instances"] for m, i in ((model, inputs), (other, other_inputs))
        )
    assert len(expected) > 0
    boxes = (result.pred_boxes.tensor for result in (found, expected))
    torch.testing.assert_close(*boxes, rtol=rtol, atol=pixels)
    torch.testing.assert_close(found.scores, expected.scores, rtol=rtol, atol=atol)


def lively_detector(**changes):
    """A tiny detector that finds something."""
    model = tiny_detector(**changes)
    torch.nn.init.normal_(model.proposal_generator.head.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(model.proposal_generator.head.bbox_pred.weight, std=0.1)
    return model


def test_a_file_of_the_authors_gives_their_boxes_half_a_pixel_further(tmp_path, caplog):
    theirs = lively_detector(pixel_mean=[102.9801, 115.9465, 122.7717], pixel_std=[1.0] * 3)
    path = save_as(theirs, "author", tmp_path / "author.pth")
    ours = tiny_detector()
    with caplog.at_level(logging.INFO, logger="atss"):
        load_or_resume(ATSSCheckpointer(ours, str(tmp_path)), path, resume=False)
    assert ours.proposal_generator.box_offset == 0.5
    assert "another code base (author)" in caplog.text and "model.box_offset: 0.0" in caplog.text
    theirs.proposal_generator.box_offset = 0.5
    inputs = make_input()
    assert_detect_the_same(ours, inputs, theirs, inputs)


def test_fine_tuning_weights_of_the_authors_ends_without_bias(tmp_path):
    path = save_as(tiny_detector(), "author", tmp_path / "author.pth")
    model = tiny_detector()
    ATSSCheckpointer(model).load(path)
    assert model.proposal_generator.box_offset == 0.5
    batch = [
        make_input(64, 96, [[10.0, 12, 40, 44]], [0]), make_input(64, 96, [[50.0, 8, 86, 48]], [2])
    ]  # fmt: skip
    steps = 120
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = [x["instances"].pred_boxes.tensor[0] for x in model.eval()(batch)]
    truth = torch.cat([x["instances"].gt_boxes.tensor for x in batch])
    errors = torch.stack(found) - truth
    assert errors.abs().mean() < 0.1 and errors.mean(dim=0).abs().max() < 0.1, errors


def test_a_file_of_mmdetection_gives_the_boxes_of_its_geometry(tmp_path):
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    theirs = lively_detector(
        input_format="RGB",
        pixel_mean=mean,
        pixel_std=std,
        selector=DetectionSelector(sqrt_score=False),
    )
    theirs.proposal_generator.anchor_generator.offset = 0.0
    theirs.backbone.top_block.relu_before_p7 = False
    path = save_as(theirs, "mmdet", tmp_path / "mmdet.pth")
    ours = tiny_detector()  # BGR
    ATSSCheckpointer(ours).load(path)
    rgb = make_input()
    bgr = {**rgb, "image": rgb["image"].flip(0)}
    assert_detect_the_same(ours, bgr, theirs, rgb, rtol=1e-3, atol=1e-4, pixels=1e-2)


def test_a_saved_checkpoint_remembers_the_geometry(tmp_path):
    path = save_as(tiny_detector(), "author", tmp_path / "author.pth")
    checkpointer = ATSSCheckpointer(tiny_detector(), str(tmp_path))
    checkpointer.load(path)
    checkpointer.save("fine_tuned")
    model = tiny_detector()
    ATSSCheckpointer(model).load(str(tmp_path / "fine_tuned.pth"))
    assert model.proposal_generator.box_offset == 0.5


def test_a_checkpoint_of_version_0_1_gives_its_geometry(tmp_path):
    path = tmp_path / "old.pth"
    overrides = {"model.box_offset": 0.5, "model.sqrt_score": False, "model.input_format": "BGR"}
    torch.save({"model": tiny_detector().state_dict(), OVERRIDES_KEY: overrides}, path)
    model = tiny_detector()
    ATSSCheckpointer(model).load(str(path))
    assert model.proposal_generator.box_offset == 0.5
    assert model.proposal_generator.selector.sqrt_score is False


def test_a_model_without_tower_biases_takes_weights_of_mmdetection(tmp_path):
    path = save_as(tiny_detector(), "mmdet", tmp_path / "mmdet.pth")
    model = tiny_detector(head=dict(conv_bias=False))
    ATSSCheckpointer(model).load(path)
    assert model.proposal_generator.anchor_generator.offset == 0.0


def test_foreign_weights_of_other_classes_or_depth_are_refused(tmp_path):
    path = save_as(tiny_detector(num_classes=3), "author", tmp_path / "author.pth")
    with pytest.raises(CheckpointError, match="knows 3 classes, the model 5.*--num-classes 5"):
        ATSSCheckpointer(tiny_detector(num_classes=5)).load(path)
    with pytest.raises(CheckpointError, match="another architecture"):
        ATSSCheckpointer(tiny_detector(head=dict(num_convs=2))).load(path)


@pytest.mark.parametrize("name", ["broken.pth", "broken.pkl"])
def test_the_checkpointer_can_be_used_again_after_a_broken_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02no pickle")
    model = tiny_detector()
    checkpointer = ATSSCheckpointer(model)
    with pytest.raises(CheckpointError, match="truncated, corrupt"):
        checkpointer.load(str(tmp_path / name))
    checkpointer.load(save_as(tiny_detector(), "author", tmp_path / "author.pth"))


def test_the_tool_writes_what_detectron2_loads_alone(tmp_path, capsys):
    model = tiny_detector()
    path = save_as(model, "author", tmp_path / "author.pth")
    out = str(tmp_path / "out.pth")

    assert convert_tool([path, out]) == 0

    printed = capsys.readouterr().out
    assert "model.box_offset=0.5   (MODEL.ATSS.BOX_OFFSET)" in printed
    assert read_checkpoint(out)[OVERRIDES_KEY]["model.box_offset"] == 0.5
    loaded = tiny_detector()
    DetectionCheckpointer(loaded).load(out)
    assert loaded.proposal_generator.box_offset == 0.5
    assert_equal(dict(loaded.named_parameters()), dict(model.named_parameters()))


def test_the_tool_goes_back_and_renews_heads(tmp_path, capsys):
    model = tiny_detector()
    path = save_as(model, "mmdet", tmp_path / "mmdet.pth")
    ours, back = str(tmp_path / "ours.pth"), str(tmp_path / "back.pth")
    assert convert_tool([path, ours]) == 0
    assert convert_tool([ours, back, "--to", "mmdet"]) == 0
    assert_equal(read_checkpoint(back)["state_dict"], read_checkpoint(path)["state_dict"])

    assert convert_tool([ours, back, "--num-classes", "5"]) == 0
    assert "re-initialised: 2" in capsys.readouterr().out
    content = read_checkpoint(back)
    assert len(content["model"]["proposal_generator.head.cls_logits.bias"]) == 5
    assert content[OVERRIDES_KEY]["model.anchor_generator.offset"] == 0.0


def test_the_tool_compares_with_a_config(tmp_path):
    path = save_as(model_zoo.get("toy/atss_toy", device="cpu"), "author", tmp_path / "author.pth")
    ours, again = str(tmp_path / "ours.pth"), str(tmp_path / "again.pth")
    assert convert_tool([path, ours, "--config", "atss_toy"]) == 0
    assert convert_tool([ours, again, "--config", "atss_toy"]) == 0  # now with geometry


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_bytes(b""), "truncated, corrupt"),
        (lambda path: torch.save({"fc.weight": torch.zeros(1)}, path), "not weights of an ATSS"),
        (lambda path: None, "no checkpoint file"),
        (lambda path: save_as(tiny_detector(), "author", path), "do not fit the model"),
    ],
)
def test_the_tool_fails_in_one_sentence_and_leaves_out_alone(tmp_path, capsys, make, message):
    make(tmp_path / "in.pth")
    out = tmp_path / "out.pth"
    out.write_text("precious")

    options = ["--config", "atss_toy", "--num-classes", "3"]
    assert convert_tool([str(tmp_path / "in.pth"), str(out), *options]) == 1

    error = capsys.readouterr().err.strip()
    assert message in error and "Traceback" not in error
    assert out.read_text() == "precious"
    assert set(os.listdir(tmp_path)) <= {"in.pth", "out.pth"}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A name whose published weights are a local file, with its hash in the name."""
    plain = save_as(tiny_detector(), "mmdet", tmp_path / "plain.pth")
    with open(plain, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:8]
    path = tmp_path / f"atss-{digest}.pth"
    os.rename(plain, path)

    def local_path(url, **kwargs):
        return url.replace("https://weights.invalid", str(tmp_path))

    monkeypatch.setattr("atss.checkpoint.files.PathManager.get_local_path", local_path)
    monkeypatch.setattr(model_zoo, "instantiate", lambda config: tiny_detector())
    url = f"https://weights.invalid/{path.name}"
    monkeypatch.setitem(model_zoo._URLS, "coco/atss_R_50_FPN_1x", url)
    return path


def test_published_weights_load_by_name_and_are_converted_once(published):
    model = model_zoo.get("atss_R_50_FPN_1x", trained=True, device="cpu")
    assert model.proposal_generator.anchor_generator.offset == 0.0
    converted = f"{str(published)[:-4]}.atss.pth"
    written = os.path.getmtime(converted)
    again = model_zoo.get("atss_R_50_FPN_1x", trained=True, device="cpu")
    assert os.path.getmtime(converted) == written
    assert_equal(again.state_dict(), model.state_dict())


def test_a_download_with_another_hash_is_refused(published):
    published.write_bytes(published.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="not what its name promises"):
        model_zoo.get("atss_R_50_FPN_1x", trained=True, device="cpu")


def test_names_with_and_without_published_weights():
    assert model_zoo.get_checkpoint_url("atss_R_50_FPN_1x").endswith("-985f7bd0.pth")
    with pytest.raises(ValueError, match="github.com/sfzhang15/ATSS"):
        model_zoo.get_checkpoint_url("atss_dcnv2_R_50_FPN_1x")
    with pytest.raises(ValueError, match="Unknown config"):
        model_zoo.get_checkpoint_url("atss_R_7")


def norm_detector(norm, **changes):
    options = dict(stem_out_channels=32, res2_out_channels=32, out_channels=64)
    return tiny_detector(backbone=resnet_fpn(18, norm=norm, freeze_at=0, **options), **changes)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN"])
def test_weights_of_something_else_are_refused_whatever_the_norm(norm, tmp_path):
    torch.save({"model": {"foo.weight": torch.zeros(2)}}, tmp_path / "foo.pth")
    model = norm_detector(norm)
    with pytest.raises(CheckpointError, match="match no parameter.*'foo.weight'.*model needs"):
        path = str(tmp_path / "foo.pth")
        load_or_resume(ATSSCheckpointer(model), path, resume=False, allow_partial=True)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
@pytest.mark.parametrize("source", ["torchvision", "mmdet"])
def test_batch_norms_take_weights_of_other_code_bases(source, norm, tmp_path):
    trained = norm_detector("BN")
    with torch.no_grad():
        trained.backbone.bottom_up.stem.conv1.norm.running_mean.fill_(3.0)
    weights = convert_checkpoint(trained.state_dict(), target="mmdet").state_dict
    if source == "torchvision":
        start = "backbone."
        weights = {n[len(start) :]: v for n, v in weights.items() if n.startswith(start)}
    torch.save({"state_dict": weights}, tmp_path / "other.pth")
    model, path = norm_detector(norm), str(tmp_path / "other.pth")
    load_or_resume(ATSSCheckpointer(model), path, resume=False, allow_partial=True)
    assert float(model.backbone.bottom_up.stem.conv1.norm.running_mean[0]) == 3.0


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_classes": 5}, "2 of another shape .*cls_logits"),
        ({"head": {"num_convs": 2}}, "missing .*tower"),
        ({"head": {"centerness": False}, "loss": {"quality": None}}, "unknown to the model"),
    ],
)
def test_only_training_takes_weights_that_fit_in_part(changes, words, tmp_path, caplog):
    ATSSCheckpointer(tiny_detector(), str(tmp_path)).save("model_final")
    path = str(tmp_path / "model_final.pth")
    model = tiny_detector(**changes)
    refused = f"not those of this model.*{words}"
    with pytest.raises(CheckpointError, match=refused):
        ATSSCheckpointer(model).load(path)
    with pytest.raises(CheckpointError, match=refused):
        load_or_resume(ATSSCheckpointer(model), path, resume=False)
    with caplog.at_level(logging.WARNING):
        load_or_resume(ATSSCheckpointer(model), path, resume=False, allow_partial=True)
    assert len([r for r in caplog.messages if "are not loaded" in r]) == 1
    assert len(caplog.messages) == 1  # not one line for each parameter


def test_a_resumed_run_needs_all_of_its_weights(tmp_path):
    ATSSCheckpointer(tiny_detector(), str(tmp_path)).save("model_final")
    checkpointer = ATSSCheckpointer(tiny_detector(num_classes=5), str(tmp_path))
    with pytest.raises(CheckpointError, match="not those of this model"):
        load_or_resume(checkpointer, "", resume=True, allow_partial=True)


@pytest.mark.parametrize(
    "loader", [ATSSCheckpointer, DetectionCheckpointer, torch.nn.Module.load_state_dict]
)
def test_a_prepared_model_refuses_weights(loader, tmp_path):
    model = tiny_detector()
    ATSSCheckpointer(model, str(tmp_path)).save("model_final")
    for prepared in (prepare_for_inference(model), copy.deepcopy(prepare_for_inference(model))):
        with pytest.raises(RuntimeError, match="prepared for inference.*Load them first"):
            if loader is torch.nn.Module.load_state_dict:
                loader(prepared, model.state_dict(), strict=False)
            else:
                loader(prepared).load(str(tmp_path / "model_final.pth"))


def test_class_names_travel_with_the_weights(tmp_path):
    saver = ATSSCheckpointer(tiny_detector(), str(tmp_path), class_names=["x", "y", "z"])
    saver.save("model_final")
    loaded = load_or_resume(ATSSCheckpointer(tiny_detector()), str(tmp_path), resume=False)
    assert loaded.class_names == ["x", "y", "z"]
    ATSSCheckpointer(tiny_detector(), str(tmp_path)).save("without")
    loaded = load_or_resume(ATSSCheckpointer(tiny_detector()), str(tmp_path), resume=False)
    assert loaded.class_names is None


def test_own_weights_below_state_dict_load(tmp_path):
    trained, model = tiny_detector(), tiny_detector()
    torch.save({"state_dict": trained.state_dict(), "epoch": 3}, tmp_path / "own.pth")
    ATSSCheckpointer(model).load(str(tmp_path / "own.pth"))
    assert_equal(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize("scheme", ["detectron2", "catalog", "https"])
def test_weights_that_do_not_arrive_are_one_sentence(scheme, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("atss.checkpoint.files.PathManager.get_local_path", refuse)
    with pytest.raises(CheckpointError, match="Cannot get .*no route.*init_checkpoint"):
        require_weights(str(tmp_path), f"{scheme}://a/b.pkl", resume=False)


def test_a_date_at_the_end_of_an_address_is_no_hash(tmp_path, monkeypatch):
    path = save_as(tiny_detector(), "mmdet", tmp_path / "atss_r50-20200209.pth")
    monkeypatch.setattr("atss.checkpoint.files.PathManager.get_local_path", lambda url, **_: path)
    assert fetch("https://weights.invalid/atss_r50-20200209.pth") == path
    with pytest.raises(CheckpointError, match="not what its name promises"):
        fetch("https://weights.invalid/atss_r50-20209999.pth")
