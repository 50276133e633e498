"""Backbones: deformable blocks compared with Detectron2's, pyramid levels, training and tracing."""

import pytest
import torch
from atss.backbone import DeformBottleneckBlock, resnet_fpn
from atss.head import ATSSHead
from atss.layers import DeformConv2d
from atss.model_zoo import get_config
from conftest import (
    assert_every_parameter_learns,
    make_input,
    needs_deform_conv,
    saved_and_loaded,
    shapes_of,
)

from detectron2.config import instantiate
from detectron2.modeling.backbone import resnet

THIN = dict(
    norm="GN", freeze_at=0, width_per_group=32, stem_out_channels=32, res2_out_channels=32,
    out_channels=32,
)  # fmt: skip
OPTIONS = dict(bottleneck_channels=8, stride=2, norm="BN", num_groups=2)


@needs_deform_conv
@pytest.mark.parametrize("modulated, groups", [(True, 1), (False, 2)])
def test_block_has_the_parameters_of_detectron2s(modulated, groups):
    options = dict(deform_modulated=modulated, deform_num_groups=groups, **OPTIONS)
    theirs = resnet.DeformBottleneckBlock(16, 32, **options)
    assert shapes_of(DeformBottleneckBlock(16, 32, **options)) == shapes_of(theirs)


@needs_deform_conv
def test_block_computes_what_detectron2s_computes_from_its_weights():
    theirs = resnet.DeformBottleneckBlock(16, 32, deform_modulated=False, **OPTIONS).eval()
    torch.nn.init.normal_(theirs.conv2_offset.weight)
    ours = DeformBottleneckBlock(16, 32, deform_modulated=False, **OPTIONS).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 16, 9, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_block_starts_as_the_ordinary_one_because_its_offsets_are_zero():
    block = DeformBottleneckBlock(16, 32, deform_modulated=False, **OPTIONS).eval()
    plain = resnet.BottleneckBlock(16, 32, **OPTIONS).eval()
    weights = block.state_dict()
    assert weights.pop("conv2_offset.weight").abs().sum() == 0
    assert weights.pop("conv2_offset.bias").abs().sum() == 0
    plain.load_state_dict(weights)
    x = torch.randn(1, 16, 9, 8)
    torch.testing.assert_close(block(x), plain(x))


def test_only_the_stages_asked_for_are_deformable_and_they_learn():
    model = resnet_fpn(depth=50, deform_on_per_stage=(False, False, True, True), **THIN)
    for name, is_deformable in (("res2", 0), ("res3", 0), ("res4", 1), ("res5", 1)):
        blocks = getattr(model.bottom_up, name)
        assert [isinstance(b.conv2, DeformConv2d) for b in blocks] == [is_deformable] * len(blocks)
    sum(f.square().mean() for f in model(torch.randn(2, 3, 64, 64)).values()).backward()
    for block in model.bottom_up.res4:
        assert block.conv2_offset.weight.grad.abs().sum() > 0


def test_traced_deformable_model_saves_loads_and_agrees_on_another_size():
    backbone = resnet_fpn(depth=50, deform_on_per_stage=(False, True, True, True), **THIN)
    head = ATSSHead(32, num_classes=3, num_convs=2, norm="", deformable=True)
    for block in backbone.bottom_up.res4:
        torch.nn.init.normal_(block.conv2_offset.weight, std=0.1)
    model = torch.nn.ModuleList((backbone, head)).eval().requires_grad_(False)

    def predict(image):
        features = list(model[0](image).values())
        return tuple(model[1](features).all_maps)

    loaded = saved_and_loaded(torch.jit.trace(predict, torch.randn(1, 3, 96, 128)))
    image = torch.randn(2, 3, 160, 96)
    torch.testing.assert_close(loaded(image), predict(image))


def test_p2_comes_with_res2_and_leaves_the_other_levels_alone():
    shapes = resnet_fpn(depth=18, in_features=("res2", "res3", "res4", "res5"), **THIN)
    strides = {name: shape.stride for name, shape in shapes.output_shape().items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    assert "p2" not in resnet_fpn(depth=18, **THIN).output_shape()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(depth=42), r"depth to be one of \[18, 34, 50, 101, 152\], got 42"),
        (dict(depth=50, deform_on_per_stage=(True, True)), r"each of res2 to res5.*\[True, True\]"),
        (dict(depth=18, deform_on_per_stage=(False, False, False, True)), "below depth 50"),
        (dict(depth=50, in_features=("res2", "res4")), r"consecutive stages.*\['res2', 'res4'\]"),
    ],
)
def test_depth_and_stages_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resnet_fpn(**options, **THIN)


@pytest.mark.parametrize("num_top_levels, names", [(1, "p2 p3 p4 p5 p6"), (0, "p2 p3 p4 p5")])
def test_levels_above_p5_are_made_as_asked_and_all_of_them_learn(num_top_levels, names):
    stages = ["res2", "res3", "res4", "res5"]
    backbone = resnet_fpn(18, **THIN, in_features=stages, num_top_levels=num_top_levels)
    features = backbone(torch.rand(1, 3, 64, 64))
    assert list(features) == list(backbone.output_shape()) == names.split()
    sum(x.sum() for x in features.values()).backward()
    assert_every_parameter_learns(backbone)


def test_dcn_toy_learns_two_images_on_the_cpu():
    config = get_config("toy/atss_dcn_toy").model
    model = instantiate(config).train()
    batch = [
        make_input(64, 96, [[8.0, 8, 40, 48]], [1]),
        make_input(64, 96, [[20, 4, 60, 60]], [2]),
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(15):
        total = sum(model(batch).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]
    offset = model.proposal_generator.head.cls_tower[-3].conv_offset
    assert offset.weight.grad.abs().sum() > 0
