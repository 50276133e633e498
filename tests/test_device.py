"""Tests of copies to the device, and of what is compiled."""

import warnings

import pytest
import torch
from atss import device as device_module
from atss.device import (
    CompiledWhereSupported,
    compile_dense_parts,
    has_fast_bfloat16,
    host_constant,
    instances_to_device,
    to_channels_last,
    to_device,
)
from conftest import make_input, tiny_detector
from torch import nn

from detectron2.structures import BitMasks, Boxes, Instances


def test_instances_keep_every_kind_of_field():
    instances = Instances((8, 9))
    instances.gt_boxes = Boxes(torch.rand(2, 4))
    instances.gt_classes = torch.tensor([3, 1])
    instances.gt_masks = BitMasks(torch.rand(2, 8, 9) > 0.5)
    instances.names = ["cat", "dog"]  # has no `to`
    moved = instances_to_device(instances, torch.device("meta"))
    assert moved is not instances and moved.image_size == (8, 9) and len(moved) == 2
    assert list(moved.get_fields()) == list(instances.get_fields())
    assert isinstance(moved.gt_boxes, Boxes) and moved.gt_boxes.tensor.device.type == "meta"
    assert moved.gt_classes.device.type == "meta" and moved.gt_masks.tensor.device.type == "meta"
    assert moved.names == ["cat", "dog"]
    assert instances.gt_classes.device.type == "cpu"  # the original stays


def test_tensor_on_its_device_is_not_copied():
    tensor = torch.rand(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_constants_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        constant = host_constant([[1, 2], [3, 4]], torch.device("cpu"))
    assert constant.tolist() == [[1, 2], [3, 4]] and constant.dtype == torch.int64


def test_function_that_cannot_be_compiled_runs_as_it_is_and_says_so_once(monkeypatch):
    def broken(function, **_):
        def fail(*_):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    double = CompiledWhereSupported(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="runs uncompiled.*no compiler here"):
        assert double(3) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(4) == 8


def test_compiled_parts_keep_their_names_and_losses(monkeypatch):
    # The eager backend stands for the compiler, which takes a minute: what is compiled and under
    # which names is the same.
    compiled = []
    real = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, **kwargs: (compiled.append(self), real(self, backend="eager"))[1],
    )
    torch.manual_seed(0)
    model = tiny_detector()
    batch = [make_input(64, 64, [[5, 5, 40, 40]], [1])]
    expected = model(batch)
    names = list(model.state_dict())
    compile_dense_parts(model)
    losses = model(batch)
    assert compiled == [model.backbone, model.proposal_generator.head]
    assert list(model.state_dict()) == names
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], atol=1e-5, rtol=1e-4)
    sum(losses.values()).backward()


@pytest.mark.parametrize("capability, is_fast", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_is_fast_on_gpus_that_compute_in_it(monkeypatch, capability, is_fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # emulation counts there
    assert has_fast_bfloat16(torch.device("cuda")) is is_fast


@pytest.mark.parametrize(
    "features, is_fast", [("avx2 amx_bf16", True), ("avx512_bf16", True), ("avx512f", False)]
)
def test_bfloat16_is_fast_on_cpus_with_instructions_for_it(monkeypatch, features, is_fast):
    monkeypatch.setattr(device_module, "_cpu_features", lambda: set(features.split()))
    assert has_fast_bfloat16(torch.device("cpu")) is is_fast


@pytest.mark.parametrize("version", ["2.15.0+cpu", "2.20"])
def test_convolution_that_crashes_with_channels_last_is_refused(monkeypatch, version):
    model = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2))
    monkeypatch.setattr(device_module, "_cpu_features", lambda: {"amx_tile"})
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ValueError, match="crashes on CPUs with AMX in 0, a 1x1.*channels_last"):
        to_channels_last(model)
    for harmless in (nn.Conv2d(16, 16, 1, stride=2), nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 3, 2)):
        assert to_channels_last(harmless).weight.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    to_channels_last(model)
