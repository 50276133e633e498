"""Boxes by COCO's metrics: as Detectron2's evaluator, by either package, in several processes."""

import importlib.util
import json
import logging
import math
import sys

import pytest
import torch
from atss.evaluation import CompactCOCOEvaluator, CompactDetections, build_evaluator, compact
from atss.evaluation.coco_api import choose_coco_api
from atss.postprocessing import DetectionSelector
from atss.training.launch import launch
from atss.tta import ATSSWithTTA, View
from conftest import tiny_detector
from stress.evaluation import make_detections, make_ground_truth, register

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

pytestmark = pytest.mark.usefixtures("restored_catalogs")
NUM_IMAGES, NUM_CLASSES = 24, 5


@pytest.fixture
def made(tmp_path):
    """A registered set "made" and its content."""
    ground_truth = make_ground_truth(NUM_IMAGES, NUM_CLASSES)
    (tmp_path / "made.json").write_text(json.dumps(ground_truth))
    register(ground_truth, tmp_path / "made.json", "made")
    return ground_truth


@pytest.fixture(params=["pycocotools", "faster-coco-eval"])
def use_fast_impl(request):
    if request.param == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    return request.param == "faster-coco-eval"


def detect(ground_truth):
    """Inputs and outputs of all images; the first has many detections, the third none."""
    for i, image in enumerate(ground_truth["images"]):
        objects = [a for a in ground_truth["annotations"] if a["image_id"] == image["id"]]
        count = {0: 150, 2: 0}.get(i, 30)
        found = make_detections(image["id"], count, objects, NUM_CLASSES)
        yield {"image_id": image["id"]}, {"instances": found}


def evaluate(evaluator, pairs, img_ids=None):
    evaluator.reset()
    for image, output in pairs:
        evaluator.process([image], [output])
    return evaluator.evaluate(img_ids=img_ids)["bbox"]


def assert_equal(values, others):
    assert list(values) == list(others)
    for key, value in values.items():
        assert value == pytest.approx(others[key], rel=1e-12, nan_ok=True), key


def test_values_and_file_are_those_of_detectron2(made, tmp_path, use_fast_impl):
    pairs = list(detect(made))
    theirs = COCOEvaluator("made", ["bbox"], output_dir=str(tmp_path / "theirs"))
    ours = CompactCOCOEvaluator("made", str(tmp_path / "ours"), use_fast_impl)
    values = evaluate(ours, pairs)
    assert_equal(values, evaluate(theirs, pairs))
    assert 5 < values["AP"] < 95 and len(values) == 6 + NUM_CLASSES
    assert all(values[key] > 0 for key in ("APs", "APm", "APl"))
    assert any(item["iscrowd"] for item in made["annotations"])
    name = "coco_instances_results.json"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_some_of_the_images_are_evaluated_on_request(made, use_fast_impl):
    pairs, img_ids = list(detect(made)), [image["id"] for image in made["images"][3:9]]
    theirs = evaluate(COCOEvaluator("made", ["bbox"], output_dir=None), pairs, img_ids)
    assert_equal(
        evaluate(CompactCOCOEvaluator("made", None, use_fast_impl), pairs, img_ids), theirs
    )


def test_detections_with_test_time_augmentation_are_evaluated(made, use_fast_impl):
    detector = tiny_detector(num_classes=NUM_CLASSES, selector=DetectionSelector(score_thresh=0.0))
    model = ATSSWithTTA(detector.eval(), [View(), View(flip=True)])
    images = [
        {"image": torch.rand(3, 64, 64) * 255, "image_id": image["id"]} for image in made["images"]
    ]
    pairs = [(image, model([image])[0]) for image in images]
    assert sum(len(output["instances"]) for _, output in pairs) > 100
    theirs = evaluate(COCOEvaluator("made", ["bbox"], output_dir=None), pairs)
    assert_equal(evaluate(CompactCOCOEvaluator("made", None, use_fast_impl), pairs), theirs)


def test_nothing_found_is_nan_and_no_image_is_empty(made, tmp_path, caplog):
    ours = CompactCOCOEvaluator("made", str(tmp_path))
    ours.reset()
    assert ours.evaluate() == {}
    empty = Instances((9, 9))
    empty.pred_boxes, empty.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
    empty.pred_classes = torch.zeros(0, dtype=torch.int64)
    with caplog.at_level(logging.WARNING):
        values = evaluate(ours, [({"image_id": 7}, {"instances": empty})])
    assert len(values) == 6 and all(map(math.isnan, values.values()))
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []
    assert "1 of the 24 images of made were evaluated" in caplog.text


def test_set_without_annotations_gives_a_file_only(made, tmp_path):
    del made["annotations"]
    (tmp_path / "made.json").write_text(json.dumps(made))
    ours = CompactCOCOEvaluator("made", str(tmp_path))
    image, output = next(detect({**made, "annotations": []}))
    ours.process([image], [output])
    assert ours.evaluate() == {}
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == 150


def test_names_of_images_are_allowed(made, tmp_path):
    for record in (*made["images"], *made["annotations"]):
        key = "image_id" if "image_id" in record else "id"
        record[key] = f"image {record[key]}"
    (tmp_path / "made.json").write_text(json.dumps(made))
    pairs = []
    for image in made["images"]:
        objects = [a for a in made["annotations"] if a["image_id"] == image["id"]]
        found = make_detections(len(pairs), 30, objects, NUM_CLASSES)
        pairs.append(({"image_id": image["id"]}, {"instances": found}))
    values = evaluate(CompactCOCOEvaluator("made"), pairs)
    assert_equal(values, evaluate(COCOEvaluator("made", ["bbox"], output_dir=None), pairs))


def test_what_cannot_be_evaluated_is_said(made):
    ours = CompactCOCOEvaluator("made")
    image, output = next(detect(made))
    with pytest.raises(ValueError, match="needs \"instances\".*'proposals'.*evaluator.tasks"):
        ours.process([image], [{"proposals": None}])
    output["instances"].pred_classes[3] = NUM_CLASSES
    with pytest.raises(ValueError, match="class 5 .* image 7, but made has 5 classes.*num_classes"):
        ours.process([image], [output])
    output["instances"].pred_classes[3] = 0
    ours.process([{"image_id": 8}], [output])
    with pytest.raises(ValueError, match="1 of the 1 evaluated images are not in .*made.json.* 8"):
        ours.evaluate()
    MetadataCatalog.get("no_file").set(thing_classes=["a"])
    with pytest.raises(ValueError, match="no_file has no COCO file.*output_dir"):
        CompactCOCOEvaluator("no_file")


def test_a_detection_takes_28_bytes_and_an_image_counts_once():
    detections, made = CompactDetections(), make_detections(0, 30)
    for image_id in ("a", "b", "a"):
        detections.add(image_id, made.pred_boxes.tensor, made.scores, made.pred_classes)
    assert detections.image_ids == ["a", "b"] and detections.records.nbytes == 60 * 28


def test_faster_package_is_taken_if_wanted_and_installed(monkeypatch):
    assert choose_coco_api(False).name == "pycocotools"
    if importlib.util.find_spec("faster_coco_eval"):
        assert choose_coco_api().name == "faster-coco-eval"
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert choose_coco_api().name == "pycocotools"


# Several processes


SHARES = {
    "uneven": [range(17), range(17, NUM_IMAGES)],
    "main process without images": [range(0), range(NUM_IMAGES)],
    "other process without images": [range(NUM_IMAGES), range(0)],
    "repeated by a sampler": [[*range(12), 0, 1], [*range(12, NUM_IMAGES), 0, 5]],
    "no image at all": [[], []],
}


def evaluate_shares(folder):
    """What a process does: evaluates the images of its share, for all of `SHARES`."""
    compact._ROUND = 50  # several rounds, also with few detections
    ground_truth = make_ground_truth(NUM_IMAGES, NUM_CLASSES)
    register(ground_truth, folder / "made.json", "made")
    pairs = list(detect(ground_truth))
    results = {}
    for name, shares in SHARES.items():
        evaluator = build_evaluator(["made"], output_dir=str(folder / name))
        for index in shares[comm.get_rank()]:
            evaluator.process(*([part] for part in pairs[index]))
        results[name] = evaluator.evaluate()
    (folder / f"process_{comm.get_rank()}.json").write_text(json.dumps(results))


def test_processes_evaluate_as_one(made, tmp_path):
    launch(evaluate_shares, 2, device="cpu", args=(tmp_path,))
    ours, others = (json.loads((tmp_path / f"process_{i}.json").read_text()) for i in (0, 1))
    assert others == dict.fromkeys(SHARES, {}) and ours.pop("no image at all") == {}
    theirs = evaluate(COCOEvaluator("made", ["bbox"], output_dir=None), detect(made))
    for name, values in ours.items():
        assert_equal(values["bbox"], theirs)
        file = tmp_path / name / "coco_instances_results.json"
        assert len(json.loads(file.read_text())) == 150 + 30 * (NUM_IMAGES - 2), name
