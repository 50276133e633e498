"""Values of the host on the device."""

import torch
from atss.device import host_constant, instances_to_device, to_device

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


def test_tensor_that_is_there_already_is_not_copied():
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
