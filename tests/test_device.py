"""Tests of copies to the device, and of what is compiled."""

import warnings

import pytest
import torch
from atss.device import (
    CompiledWhereSupported,
    compile_dense_parts,
    host_constant,
    instances_to_device,
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
    previous = torch.get_default_device() if hasattr(torch, "get_default_device") else "cpu"
    torch.set_default_device("meta")
    try:
        constant = host_constant([[1, 2], [3, 4]], torch.device("cpu"))
    finally:
        torch.set_default_device(previous)
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
