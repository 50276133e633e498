"""Tests of preparing a model: it detects what it did before, and says what it no longer can."""

import copy
import pickle

import pytest
import torch
from atss.backbone import resnet_fpn
from atss.inference_mode import inference_dtype, prepare_as_configured, prepare_for_inference
from atss.inference_mode.batch_norms import fold_batch_norms
from atss.inference_mode.onednn import OneDNNConv2d, OneDNNResidualBlock, use_onednn
from atss.layers import DeformConv2d, PackedDeformConv2d
from atss.model_zoo import get_config
from atss.training import update_lazy_config
from atss.tta import ATSSWithTTA, make_views
from conftest import make_input, tiny_detector
from torch import nn

from detectron2.config import instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm


def randomize_norms(model):
    """Statistics and factors as a trained model has them: not those of an identity."""
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
    return model


def make_backbone(depth=18, norm="FrozenBN", **options):
    return resnet_fpn(
        depth=depth, norm=norm, freeze_at=0, stem_out_channels=32, res2_out_channels=32,
        out_channels=64, **options,
    )  # fmt: skip


def make_detector(norm="FrozenBN", head_norm="GN", depth=18, **options):
    torch.manual_seed(0)
    head = dict(norm=head_norm, num_convs=2, deformable=options.pop("head_deformable", False))
    backbone = make_backbone(depth, norm, **options)
    model = randomize_norms(tiny_detector(backbone=backbone, head=head)).eval()
    # Some hundred candidates, so that detections have something to differ in.
    nn.init.normal_(model.proposal_generator.head.cls_logits.weight, std=0.05)
    nn.init.constant_(model.proposal_generator.head.cls_logits.bias, -2.0)
    return model


def raw_outputs(model, batch):
    """Everything the head predicts, before any threshold decides."""
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(batch).tensor)
        names = model.proposal_generator.in_features
        predictions = model.proposal_generator.head([features[name] for name in names])
    return predictions.all_maps


def detections(model, batch):
    with torch.no_grad():
        return [result["instances"] for result in model(batch)]


def assert_same_outputs(prepared, model, batch, atol=2e-4):
    for ours, expected in zip(raw_outputs(prepared, batch), raw_outputs(model, batch)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        dict(norm="FrozenBN"),
        dict(norm="BN", head_norm="BN"),
        dict(norm="GN"),
        dict(norm="FrozenBN", fpn_norm="BN"),
        dict(depth=50, num_groups=2, width_per_group=8),
        dict(depth=50, width_per_group=16, deform_on_per_stage=(False, False, True, True)),
        dict(head_deformable=True),
    ],
    ids=["FrozenBN", "BN", "GN", "BN in FPN", "groups", "deformable stages", "deformable head"],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_prepared_model_predicts_the_same(options, channels_last):
    model = make_detector(**options)
    prepared = prepare_for_inference(model, channels_last=channels_last)
    batch = [make_input(64, 96), make_input(50, 70)]  # padded, too

    assert_same_outputs(prepared, model, batch)
    # The weights rearranged on the first call do for any size.
    assert_same_outputs(prepared, model, [make_input(128, 64)])


def test_prepared_model_detects_the_same():
    model = make_detector()
    prepared = prepare_for_inference(model)
    batch = [make_input(64, 96)]
    for ours, expected in zip(detections(prepared, batch), detections(model, batch)):
        assert len(expected) > 20
        torch.testing.assert_close(ours.scores, expected.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            ours.pred_boxes.tensor.sum(), expected.pred_boxes.tensor.sum(), atol=0.1, rtol=1e-4
        )


def test_bfloat16_stays_close_and_returns_float32():
    model = make_detector()
    prepared = prepare_for_inference(model, dtype=torch.bfloat16)
    batch = [make_input(64, 96)]
    for ours, expected in zip(raw_outputs(prepared, batch), raw_outputs(model, batch)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, atol=0.15, rtol=0)
        assert (ours - expected).abs().mean() < 0.02
    result = detections(prepared, batch)[0]
    assert result.scores.dtype == result.pred_boxes.tensor.dtype == torch.float32


def test_deformable_model_runs_in_bfloat16_though_the_operator_does_not():
    model = make_detector(
        depth=50, width_per_group=16, deform_on_per_stage=(False, False, True, True),
        head_deformable=True,
    )  # fmt: skip
    prepared = prepare_for_inference(model, dtype=torch.bfloat16)
    for level in raw_outputs(prepared, [make_input(64, 64)]):
        assert torch.isfinite(level).all() and level.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_two_stage_model_is_prepared_whole(dtype):
    cfg = get_config("toy/mask_rcnn_atss_toy")
    torch.manual_seed(0)
    model = randomize_norms(instantiate(cfg.model)).eval()
    prepared = prepare_for_inference(model, dtype=dtype)
    batch = [make_input(96, 128)]
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features, expected = prepared.backbone(images.tensor), model.backbone(images.tensor)
    for name in expected:
        atol = 1e-3 if dtype is None else 0.1 * float(expected[name].abs().max())
        torch.testing.assert_close(features[name].float(), expected[name], atol=atol, rtol=0)
    result = detections(prepared, batch)[0]
    assert result.scores.dtype == torch.float32 and result.has("pred_masks")


def test_the_given_model_stays_as_it_is_unless_asked():
    model = make_detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = prepare_for_inference(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(model.backbone.bottom_up.stem.conv1) is Conv2d
    model.train()  # still can

    assert prepare_for_inference(model, inplace=True) is model
    assert len(model.state_dict()) < len(before) and prepared is not model


def test_prepared_model_refuses_to_train_and_to_be_prepared_again():
    prepared = prepare_for_inference(make_detector())
    with pytest.raises(RuntimeError, match="prepared for inference.*cannot train"):
        prepared.train()
    assert prepared.eval() is prepared and prepared.train(False) is prepared
    with pytest.raises(RuntimeError, match="cannot train"):
        copy.deepcopy(prepared).train()
    with pytest.raises(ValueError, match="prepared for inference already"):
        prepare_for_inference(prepared)
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


def test_what_cannot_be_prepared_is_refused():
    model = make_detector()
    with pytest.raises(ValueError, match="takes an ATSSDetector.*got Sequential"):
        prepare_for_inference(nn.Sequential())
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        prepare_for_inference(model, dtype=torch.float16)
    with pytest.raises(ValueError, match="got torch.int8"):
        prepare_for_inference(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="precision to be one of.*bfloat16.*got 'half'"):
        inference_dtype("half", torch.device("cpu"))


def test_prepared_model_can_be_copied_saved_and_traced():
    prepared = prepare_for_inference(make_detector(), dtype=torch.bfloat16)
    batch = [make_input(64, 64)]
    expected = raw_outputs(prepared, batch)
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        torch.testing.assert_close(raw_outputs(other, batch), expected)

    head = prepare_for_inference(make_detector()).proposal_generator.head.bbox_tower
    x = torch.rand(1, 64, 8, 8)
    with torch.no_grad():
        traced = torch.jit.trace(head, x)
        torch.testing.assert_close(traced(x), head(x), atol=1e-4, rtol=1e-4)
    assert "mkldnn" not in str(traced.inlined_graph)


def test_prepared_model_works_under_test_time_augmentation():
    prepared = prepare_for_inference(make_detector())
    tta = ATSSWithTTA(prepared, make_views([64, 96], 200, True, ())).eval()
    batch = [{**make_input(64, 80), "file_name": ""}]
    assert len(detections(tta, batch)[0]) > 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_prepared_model_runs_in_inference_mode_and_under_autocast(dtype):
    prepared = prepare_for_inference(make_detector(), dtype=dtype)
    batch = [make_input(64, 64)]
    expected = detections(prepared, batch)[0]
    with torch.inference_mode():
        result = copy.deepcopy(prepared)(batch)[0]["instances"]
    torch.testing.assert_close(result.scores, expected.scores)
    with torch.autocast("cpu", torch.bfloat16):
        result = detections(prepared, batch)[0]
    assert abs(len(result) - len(expected)) <= 5 and result.scores.dtype == torch.float32


def test_compiled_parts_are_the_backbone_and_the_head(monkeypatch):
    # The eager backend stands for the compiler, which takes a minute.
    compiled, real = [], nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, **kwargs: (compiled.append(kwargs), real(self, backend="eager", **kwargs)),
    )
    model = make_detector()
    prepared = prepare_for_inference(model, compile=True)
    assert compiled == [{"dynamic": True}] * 2
    assert_same_outputs(prepared, model, [make_input(64, 96)])
    assert not any(isinstance(module, OneDNNConv2d) for module in prepared.modules())


def test_config_decides_whether_and_how_to_prepare():
    cfg = get_config("toy/atss_toy")
    assert not cfg.train.prepare.enabled  # evaluation equals training unless asked
    model = make_detector()
    assert prepare_as_configured(model, cfg.train.prepare) is model
    assert "is_prepared_for_inference" not in model.__dict__

    update_lazy_config(cfg, ["train.prepare.enabled=True", "train.prepare.precision=bfloat16"])
    prepared = prepare_as_configured(model, cfg.train.prepare)
    assert prepared is model and prepared.backbone.bottom_up.stem.conv1.weight.dtype == (
        torch.bfloat16
    )


def test_folding_counts_every_fixed_norm_and_leaves_the_others():
    model = make_backbone(18, "FrozenBN")
    count = sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    assert fold_batch_norms(model) == count > 0
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())

    assert fold_batch_norms(make_backbone(18, "GN")) == 0
    training = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).train()
    assert fold_batch_norms(training) == 0  # its statistics are of the batch


def test_convolution_shared_by_two_norms_is_not_folded():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleList(
        nn.Sequential(conv, randomize_norms(nn.BatchNorm2d(4))) for _ in range(2)
    ).eval()
    x = torch.rand(1, 4, 6, 6)
    expected = [branch(x) for branch in model]
    assert fold_batch_norms(model) == 0
    torch.testing.assert_close([branch(x) for branch in model], expected)


@pytest.mark.parametrize("layer", [Conv2d, DeformConv2d, PackedDeformConv2d])
def test_activation_after_a_norm_stays_after_it(layer):
    conv = layer(4, 4, 3, padding=1, norm=randomize_norms(get_norm("BN", 4)), activation=nn.ReLU())
    conv.eval()
    inputs = [torch.randn(1, 4, 6, 6)]
    inputs += [torch.randn(1, 18, 6, 6)] if layer is DeformConv2d else []
    expected = conv(*inputs)
    assert fold_batch_norms(conv) == 1 and expected.min() == 0
    torch.testing.assert_close(conv(*inputs), expected)


def test_onednn_convolution_computes_as_before_where_the_operators_cannot():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    if use_onednn(model) == 0:
        pytest.skip("this torch lacks oneDNN's operators")
    conv = model[0]
    assert isinstance(conv, OneDNNConv2d)
    x = torch.rand(1, 4, 6, 6, requires_grad=True)
    conv(x).sum().backward()  # a gradient is needed
    assert x.grad is not None and conv.weight.grad is not None
    with torch.no_grad():
        assert conv(torch.rand(0, 4, 6, 6)).shape == (0, 4, 6, 6)
        first = conv(x)
        conv.load_state_dict({"weight": 2 * conv.weight, "bias": 2 * conv.bias})
        torch.testing.assert_close(conv(x), 2 * first)  # not the weights packed before
        conv.double()
        torch.testing.assert_close(conv(x.double()), 2 * first.double(), atol=1e-5, rtol=0)


def test_block_does_not_write_over_a_feature_of_the_stage_before():
    backbone = randomize_norms(make_backbone(18, "FrozenBN")).eval().requires_grad_(False)
    fold_batch_norms(backbone)
    if use_onednn(backbone) == 0:
        pytest.skip("this torch lacks oneDNN's operators")
    stage = backbone.bottom_up.stages[0]  # its first block has the input itself as shortcut
    x = torch.randn(1, 32, 16, 16)
    before = x.clone()
    assert isinstance(stage[0], OneDNNResidualBlock) and stage[0].shortcut is None
    with torch.no_grad():
        stage(x)
    torch.testing.assert_close(x, before, atol=0, rtol=0)
