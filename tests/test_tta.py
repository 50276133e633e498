"""Tests of test-time augmentation: what views see, which boxes count, how they are merged."""

import math

import cv2
import numpy as np
import pytest
import torch
from atss.config import add_atss_config
from atss.tta import RELEASE_MIN_SIZES, ATSSWithTTA, View, make_views, release_views
from conftest import make_input, tiny_detector

from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances


@pytest.fixture
def detector():
    model = tiny_detector().eval()
    torch.nn.init.normal_(model.proposal_generator.head.cls_logits.weight, std=0.3)
    return model


class Recorder(torch.nn.Module):
    """A detector that finds one given box, in relative coordinates, and keeps its inputs."""

    input_format = "BGR"

    def __init__(self, box=(0.1, 0.2, 0.3, 0.6)):
        super().__init__()
        self.box = torch.tensor(box)
        self.seen = []
        self.eval()

    def forward(self, batched_inputs):
        assert len(batched_inputs) == 1  # one view at a time
        image = batched_inputs[0]["image"]
        self.seen.append(image)
        height, width = image.shape[1:]
        result = Instances((height, width))
        scale = torch.tensor([width, height, width, height])
        result.pred_boxes = Boxes((self.box * scale)[None])
        result.scores = torch.tensor([0.5])
        result.pred_classes = torch.tensor([0])
        return [{"instances": result}]


@pytest.mark.parametrize("merge", ["nms", "vote", "soft-vote"])
@pytest.mark.parametrize("view", [View(), View(min_size=64, max_size=96)])
def test_one_identity_view_is_plain_inference_exactly(detector, merge, view):
    inputs = make_input(64, 96)
    inputs["image"] = inputs["image"].to(torch.uint8)
    inputs.update(height=100, width=151)  # the output has another size
    with torch.no_grad():
        expected = detector([inputs])[0]["instances"]

    found = ATSSWithTTA(detector, [view], merge)([inputs])[0]["instances"]

    assert len(expected) > 10 and found.image_size == expected.image_size
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("merge", ["nms", "vote", "soft-vote"])
def test_the_same_view_twice_changes_nothing(detector, merge):
    inputs = make_input(64, 96)
    with torch.no_grad():
        expected = detector([inputs])[0]["instances"]
    found = ATSSWithTTA(detector, [View(), View()], merge)([inputs])[0]["instances"]
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_boxes_of_mirrored_and_scaled_views_are_in_the_frame_of_the_output():
    model = Recorder()
    views = [View(flip=True), View(min_size=20, max_size=100, flip=True)]
    inputs = {"image": torch.zeros(3, 40, 60, dtype=torch.uint8), "height": 80, "width": 120}

    found = ATSSWithTTA(model, views, "vote")([inputs])[0]["instances"]

    # x from 0.1..0.3 to 0.7..0.9 of 120, y 0.2..0.6 of 80, the same from both views
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([[84.0, 16.0, 108.0, 48.0]]))
    assert [tuple(image.shape) for image in model.seen] == [(3, 40, 60), (3, 20, 30)]


def test_mirrored_views_see_the_mirrored_image():
    model = Recorder()
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4).expand(3, 3, 4)
    ATSSWithTTA(model, [View(), View(flip=True)])([{"image": image}])
    assert torch.equal(model.seen[0], image)
    assert torch.equal(model.seen[1], image.flip(2))


def test_boxes_outside_the_size_range_of_a_view_do_not_count():
    # In a view of 40 x 60 the box is 12 x 16 px, of size sqrt(192) = 13.86.
    inputs = {"image": torch.zeros(3, 40, 60, dtype=torch.uint8)}
    for size_range, count in (((0, 13.8), 0), ((13.8, 13.9), 1), ((13.9, math.inf), 0)):
        model = ATSSWithTTA(Recorder(), [View(size_range=size_range)])
        assert len(model([inputs])[0]["instances"]) == count


def test_scaled_views_start_from_the_file_of_the_image(tmp_path):
    path = str(tmp_path / "image.png")
    array = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    cv2.imwrite(path, array)
    small = torch.zeros(3, 16, 24, dtype=torch.uint8)
    inputs = {"image": small, "file_name": path, "height": 32, "width": 48}

    model = Recorder()
    ATSSWithTTA(model, [View(min_size=32), View()])([inputs])
    assert torch.equal(model.seen[0], torch.from_numpy(array.transpose(2, 0, 1)))
    assert torch.equal(model.seen[1], small)  # as it comes

    model = Recorder()
    ATSSWithTTA(model, [View(min_size=32)], read_files=False)([inputs])
    assert not model.seen[0].any()


def test_detections_are_limited(detector):
    model = ATSSWithTTA(detector, [View(), View(flip=True)], max_detections=7)
    assert len(model([make_input(64, 96)])[0]["instances"]) == 7


def test_release_views_are_those_of_the_paper():
    views = release_views()
    assert len(views) == 26
    assert views[:3] == [
        View(800, 1333, False, (0, math.inf)),
        View(800, 1333, True, (0, math.inf)),
        View(400, 1333, False, (96, math.inf)),
    ]
    assert views[-1] == View(1800, 3000, True, (0, 96))
    assert max(view.max_size for view in release_views(max_size=1500)) == 1500
    half = release_views(flip=False, base_size=400)
    assert half[1] == View(200, 666, False, (48, math.inf)) and len(half) == 13


def test_yaml_config_describes_the_views(detector):
    cfg = get_cfg()
    add_atss_config(cfg)
    assert tuple(cfg.TEST.AUG.MIN_SIZES) == RELEASE_MIN_SIZES
    model = ATSSWithTTA(cfg, detector)
    assert model.views == release_views() and model.merge == "soft-vote"

    cfg.TEST.AUG.MAX_SIZE = 1500
    assert ATSSWithTTA(cfg, detector).views == release_views(max_size=1500)
    cfg.TEST.AUG.MAX_SIZE = 4000
    cfg.merge_from_list(["TEST.AUG.MIN_SIZES", (64, 96), "TEST.AUG.FLIP", False])
    cfg.merge_from_list(["TEST.AUG.MERGE", "nms", "TEST.DETECTIONS_PER_IMAGE", 9])
    model = ATSSWithTTA(cfg, detector)
    assert model.views == make_views([64, 96], 4000, flip=False)
    assert (model.merge, model.max_detections) == ("nms", 9)

    cfg.TEST.AUG.SIZE_RANGES = [(0, 10)]
    with pytest.raises(ValueError, match="SIZE_RANGES has 1 ranges for 2"):
        ATSSWithTTA(cfg, detector)


def test_mistakes_are_named(detector):
    with pytest.raises(ValueError, match="'soft-vote'.*got 'mean'.*TEST.AUG.MERGE"):
        ATSSWithTTA(detector, merge="mean")
    with pytest.raises(ValueError, match="at least one view"):
        ATSSWithTTA(detector, [])
    with pytest.raises(RuntimeError, match="eval"):
        ATSSWithTTA(detector.train(), [View()])([make_input()])
