"""Deformable layers: results, gradients, low precision, graphs, and messages about bad inputs."""

import pytest
import torch
from atss import layers
from atss.head import ATSSHead
from atss.layers import (
    DeformConv2d,
    PackedDeformConv2d,
    set_deform_kernel,
    split_offsets,
    swap_deform_convs,
)
from conftest import needs_deform_conv, saved_and_loaded
from reference_deform_conv import naive_deform_conv
from torch import nn
from torch.nn import functional as F

from detectron2.layers import DeformConv, ModulatedDeformConv

WINDOWS = [
    # kernel, stride, padding, dilation, groups, deformable groups
    (3, 1, 1, 1, 1, 1),
    ((3, 2), (2, 1), (1, 0), (1, 2), 2, 1),
    (1, 2, 0, 1, 1, 2),
    (3, 1, 2, 2, 4, 2),
]


def make_layer(window, bias=True, dtype=torch.float32):
    kernel, stride, padding, dilation, groups, deformable_groups = window
    layer = DeformConv2d(
        4, 8, kernel, stride, padding, dilation, groups, deformable_groups, bias=bias
    ).to(dtype)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def make_inputs(layer, num_images=2, size=(6, 5), modulated=True, dtype=torch.float32):
    x = torch.randn(num_images, 4, *size, dtype=dtype)
    height, width = F.conv2d(
        x[:1, :1], x.new_zeros(1, 1, *layer.kernel_size), None, layer.stride, layer.padding,
        layer.dilation,
    ).shape[2:]  # fmt: skip
    num_taps = layer.deformable_groups * layer.kernel_size[0] * layer.kernel_size[1]
    offset = 2 * torch.randn(num_images, 2 * num_taps, height, width, dtype=dtype)
    mask = torch.rand(num_images, num_taps, height, width, dtype=dtype)
    return x, offset, mask if modulated else None


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_deform_conv_agrees_with_loops_over_every_output(window, modulated):
    layer = make_layer(window, dtype=torch.float64)
    x, offset, mask = make_inputs(layer, 1, modulated=modulated, dtype=torch.float64)

    expected = naive_deform_conv(
        x, offset, mask, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation,
        layer.groups, layer.deformable_groups,
    )  # fmt: skip
    torch.testing.assert_close(layer(x, offset, mask).detach(), expected)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradients_of_all_inputs_are_those_of_the_function(modulated):
    layer = make_layer((3, 2, 1, 1, 2, 2), dtype=torch.float64)
    x, offset, mask = make_inputs(layer, 1, (4, 3), modulated, torch.float64)
    # Bilinear interpolation has a kink where a tap meets the lattice: stay between.
    offset = offset.floor() + 0.2 + 0.6 * torch.rand_like(offset)
    tensors = [t for t in (x, offset, mask) if t is not None]
    tensors = [t.requires_grad_() for t in tensors]

    def run(weight, bias, *inputs):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, inputs)

    assert torch.autograd.gradcheck(run, (layer.weight, layer.bias, *tensors))


def test_no_offset_is_the_ordinary_convolution():
    layer = make_layer((3, 1, 1, 1, 2, 1))
    x, offset, _ = make_inputs(layer)
    expected = F.conv2d(x, layer.weight, layer.bias, 1, 1, groups=2)
    torch.testing.assert_close(layer(x, torch.zeros_like(offset)), expected)


def test_first_of_two_offset_channels_moves_down_and_the_second_right():
    layer = DeformConv2d(1, 1, 1)
    nn.init.ones_(layer.weight)
    x = torch.arange(12.0).view(1, 1, 3, 4)
    offset = torch.zeros(1, 2, 3, 4)
    offset[:, 0] = 1  # one row down: 4 further
    assert layer(x, offset)[0, 0, 0, 0] == 4
    offset = offset.flip(1)  # one column to the right
    assert layer(x, offset)[0, 0, 0, 0] == 1


@needs_deform_conv
def test_forward_is_detectron2s_on_the_cpu_with_its_weights():
    theirs = DeformConv(4, 8, 3, stride=2, padding=1, groups=2, norm=nn.GroupNorm(2, 8))
    ours = DeformConv2d(4, 8, 3, stride=2, padding=1, groups=2, norm=nn.GroupNorm(2, 8))
    ours.load_state_dict(theirs.state_dict())
    x, offset, _ = make_inputs(ours)
    torch.testing.assert_close(ours(x, offset), theirs(x, offset))


@needs_deform_conv
def test_swap_keeps_names_parameters_and_output_and_makes_cpu_training_possible():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), DeformConv(4, 8, 3, padding=1, activation=F.relu))
    modulated = nn.ModuleDict({"conv": ModulatedDeformConv(4, 8, 3, padding=1)})
    parameters = dict(model.named_parameters())
    x, offset, mask = make_inputs(make_layer(WINDOWS[0]))
    expected = model[1](x, offset)

    assert swap_deform_convs(model) is model
    swap_deform_convs(modulated)

    assert isinstance(model[1], DeformConv2d) and isinstance(modulated["conv"], DeformConv2d)
    assert {k: id(v) for k, v in model.named_parameters()} == {
        k: id(v) for k, v in parameters.items()
    }
    torch.testing.assert_close(model[1](x, offset), expected)
    with pytest.raises(NotImplementedError):  # theirs, on the CPU
        ModulatedDeformConv(4, 8, 3, padding=1)(x, offset, mask)
    modulated["conv"](x, offset, mask).sum().backward()
    assert modulated["conv"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_and_returned_as_it_came(dtype):
    layer = make_layer(WINDOWS[0])
    x, offset, mask = make_inputs(layer)
    low = layer(x.to(dtype), offset.to(dtype), mask.to(dtype))
    expected = layer(x.to(dtype).float(), offset.to(dtype).float(), mask.to(dtype).float())
    assert low.dtype == dtype
    torch.testing.assert_close(low, expected.to(dtype))


def test_packed_layer_trains_under_autocast():
    layer = PackedDeformConv2d(4, 8, 3, padding=1, norm=nn.GroupNorm(2, 8), activation=F.relu)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(torch.randn(2, 4, 6, 5)).float().square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    assert gradients["conv_offset.weight"].abs().sum() > 0


def test_empty_batch_gives_an_empty_result_of_the_right_shape():
    layer = PackedDeformConv2d(4, 8, 3, stride=2, padding=1)
    out = layer(torch.zeros(0, 4, 6, 5))
    assert out.shape == (0, 8, 3, 3)
    out.sum().backward()
    assert layer.weight.grad.abs().sum() == 0


def test_scripted_layer_saves_loads_and_agrees():
    layer = PackedDeformConv2d(4, 8, 3, padding=1, norm=nn.BatchNorm2d(8), activation=F.relu).eval()
    nn.init.normal_(layer.conv_offset.weight)
    x = torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(saved_and_loaded(torch.jit.script(layer))(x), layer(x))
    plain = make_layer(WINDOWS[0])
    inputs = make_inputs(plain, modulated=False)
    torch.testing.assert_close(torch.jit.script(plain)(*inputs), plain(*inputs))


def test_traced_deformable_head_saves_loads_and_agrees_on_another_size():
    head = ATSSHead(32, num_classes=3, num_levels=1, num_convs=2, deformable=True).eval()
    head.requires_grad_(False)
    traced = torch.jit.trace(lambda x: tuple(head([x]).all_maps), torch.randn(1, 32, 6, 5))
    x = torch.randn(2, 32, 4, 9)
    torch.testing.assert_close(saved_and_loaded(traced)(x), tuple(head([x]).all_maps))


def test_exported_layer_agrees_on_another_size():
    layer = PackedDeformConv2d(4, 8, 3, padding=1).eval()
    nn.init.normal_(layer.conv_offset.weight)
    shapes = {"x": {axis: torch.export.Dim(f"d{axis}", min=2) for axis in (0, 2, 3)}}
    program = torch.export.export(layer, (torch.randn(2, 4, 8, 9),), dynamic_shapes=shapes)
    x = torch.randn(3, 4, 10, 7)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_split_offsets_is_the_order_of_detectron2s_block():
    offset, mask = split_offsets(torch.arange(27.0).view(1, 27, 1, 1), modulated=True)
    assert offset.flatten().tolist() == list(range(18))
    torch.testing.assert_close(mask.flatten(), torch.arange(18.0, 27).sigmoid())


def test_deformable_head_deforms_only_the_last_convolution_of_both_towers():
    head = ATSSHead(32, num_classes=3, num_convs=3, deformable=True)
    for tower in (head.cls_tower, head.bbox_tower):
        convs = [m for m in tower if hasattr(m, "weight") and m.weight.dim() == 4]
        assert [type(m).__name__ for m in convs] == ["Conv2d", "Conv2d", "PackedDeformConv2d"]
        assert convs[-1].modulated and convs[-1].bias is not None
        assert convs[-1].conv_offset.weight.shape[0] == 27
        # 27 * 32 * 9 draws from N(0, 0.01): their deviation is 0.01 within a few percent.
        assert convs[-1].conv_offset.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("groups", dict(in_channels=6, out_channels=8, kernel_size=3, groups=4)),
        ("groups", dict(in_channels=8, out_channels=6, kernel_size=3, groups=4)),
        (
            "deformable_groups",
            dict(in_channels=6, out_channels=8, kernel_size=3, deformable_groups=4),
        ),
    ],
)
def test_channels_that_groups_do_not_divide_are_named_with_the_groups(kind, arguments):
    with pytest.raises(ValueError, match=rf"channels=6 and {kind}=4"):
        DeformConv2d(**arguments)


def test_offsets_that_do_not_fit_are_refused_with_both_shapes():
    layer = make_layer(WINDOWS[0])
    x, offset, mask = make_inputs(layer)
    with pytest.raises(ValueError, match=r"offset of shape \(2, 18, 6, 5\), got \(2, 17, 6, 5\)"):
        layer(x, offset[:, 1:], mask)
    with pytest.raises(ValueError, match=r"offset of shape \(2, 18, 6, 5\), got \(2, 18, 5, 5\)"):
        layer(x, offset[:, :, 1:], mask)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 9, 6, 5\), got \(2, 8, 6, 5\)"):
        layer(x, offset, mask[:, 1:])
    with pytest.raises(ValueError, match=r"\(N, 4, H, W\), got \(2, 3, 6, 5\)"):
        layer(x[:, 1:], offset, mask)


def test_types_and_devices_that_do_not_fit_are_refused_with_both():
    layer = make_layer(WINDOWS[0])
    x, offset, mask = make_inputs(layer)
    with pytest.raises(TypeError, match="x of torch.float64 but weight of torch.float32"):
        layer(x.double(), offset.double(), mask.double())
    with pytest.raises(TypeError, match="x of torch.float32 but offset of torch.float64"):
        layer(x, offset.double(), mask)
    with pytest.raises(TypeError, match="x of torch.float32 but offset of torch.int64"):
        layer(x, offset.long(), mask)
    with pytest.raises(ValueError, match="x on cpu, offset on meta"):
        layer(x, offset.to("meta"), mask)


def test_kernel_switch_refuses_unknown_names_and_a_missing_compiled_part(monkeypatch):
    monkeypatch.setattr(layers, "_kernel", "torchvision")
    with pytest.raises(ValueError, match=r"\['torchvision', 'detectron2'\], got 'cudnn'"):
        set_deform_kernel("cudnn")
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="detectron2._C"):
            set_deform_kernel("detectron2")
        assert layers._kernel == "torchvision"
        return
    layer = make_layer(WINDOWS[0])
    inputs = make_inputs(layer)
    expected = layer(*inputs)
    set_deform_kernel("detectron2")
    torch.testing.assert_close(layer(*inputs), expected)  # no effect on the CPU
    assert layers._kernel == "detectron2"


@pytest.mark.parametrize("modulated", [True, False])
def test_kernels_of_detectron2_get_contiguous_tensors(monkeypatch, modulated):
    seen = []

    def kernel(*args):
        seen.extend(x for x in args if isinstance(x, torch.Tensor) and x.dim() == 4)
        return torch.zeros(2, 8, 5, 6)

    name = "modulated_deform_conv" if modulated else "deform_conv"
    monkeypatch.setattr(layers.d2_deform, name, kernel)
    layer = DeformConv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
    sizes = (4, 18, 9) if modulated else (4, 18)
    tensors = [torch.rand(2, n, 5, 6).to(memory_format=torch.channels_last) for n in sizes]
    mask = tensors[2] if modulated else None
    layers._detectron2_deform_conv(layer, *tensors[:2], mask, layer.weight, layer.bias)
    assert len(seen) == len(sizes) + 1 and all(x.is_contiguous() for x in seen)
    for found, given in zip(seen, tensors):
        assert torch.equal(found, given)
