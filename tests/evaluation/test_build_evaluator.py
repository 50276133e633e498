"""The evaluator of a data set: by its type, for the tasks of a config of either kind."""

import json
import sys

import pytest
import torch
from atss.config import add_atss_config
from atss.evaluation import CompactCOCOEvaluator, build_evaluator
from atss.model_zoo import get_config
from atss.trainer import Trainer
from stress.evaluation import make_detections, make_ground_truth, register

from detectron2.config import get_cfg, instantiate
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

pytestmark = pytest.mark.usefixtures("restored_catalogs")
NUM_CLASSES = 3


@pytest.fixture
def made(tmp_path):
    """A registered set "made" and its content."""
    ground_truth = make_ground_truth(6, NUM_CLASSES)
    (tmp_path / "made.json").write_text(json.dumps(ground_truth))
    register(ground_truth, tmp_path / "made.json", "made")
    return ground_truth


def test_evaluator_asks_for_one_set():
    for names in ([], ["a", "b"]):
        with pytest.raises(ValueError) as error:
            build_evaluator(names, ["bbox"])
        for part in ("one data set", str(names), "dataloader.test.dataset.names"):
            assert part in str(error.value)


@pytest.mark.parametrize(
    "kind, tasks",
    [
        ("coco", []),
        ("coco", ["bbox", "mask"]),
        ("lvis", ["keypoints"]),
        ("pascal_voc", ["bbox", "segm"]),
        ("pascal_voc", ["box_proposals"]),
    ],
)
def test_tasks_that_the_evaluator_lacks_are_refused(made, kind, tasks):
    MetadataCatalog.get("made").evaluator_type = kind
    with pytest.raises(ValueError, match=f"evaluated as {kind}.*dataloader.evaluator.tasks"):
        build_evaluator(["made"], tasks)


def test_boxes_are_compact_and_other_tasks_are_detectron2s(made, tmp_path):
    assert type(build_evaluator(["made"], ["bbox"])) is CompactCOCOEvaluator
    for tasks in (["bbox", "segm"], ["segm"], ["box_proposals"]):
        assert type(build_evaluator(["made"], tasks, str(tmp_path))) is COCOEvaluator


def test_lazy_and_yaml_configs_build_the_same_evaluators(made, tmp_path):
    def build_lazy(name):
        lazy = get_config(name)
        lazy.dataloader.test.dataset.names = ["made"]
        lazy.train.output_dir = str(tmp_path)
        return instantiate(lazy.dataloader.evaluator)

    cfg = get_cfg()
    add_atss_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    boxes = [build_lazy("coco/atss_R_50_FPN_1x"), Trainer.build_evaluator(cfg, "made")]
    cfg.MODEL.MASK_ON = True
    masks = [build_lazy("coco/mask_rcnn_atss_R_50_FPN_1x"), Trainer.build_evaluator(cfg, "made")]
    for evaluator in boxes:
        assert type(evaluator) is CompactCOCOEvaluator
        assert evaluator._output_dir == str(tmp_path / "inference")
    for evaluator in masks:
        assert type(evaluator) is COCOEvaluator and evaluator._tasks == ["bbox", "segm"]
        assert evaluator._output_dir == str(tmp_path / "inference")


def test_yaml_proposals_are_evaluated_by_their_recall(made, tmp_path):
    cfg = get_cfg()
    add_atss_config(cfg)
    cfg.OUTPUT_DIR, cfg.MODEL.META_ARCHITECTURE = str(tmp_path), "ProposalNetwork"
    evaluator = Trainer.build_evaluator(cfg, "made")
    evaluator.reset()
    for image in made["images"]:
        found = make_detections(image["id"], 20)
        proposals = Instances(found.image_size)
        proposals.proposal_boxes, proposals.objectness_logits = found.pred_boxes, found.scores
        evaluator.process([{"image_id": image["id"]}], [{"proposals": proposals}])
    assert "AR@100" in evaluator.evaluate()["box_proposals"]


# Other data sets


def test_lvis_sets_are_evaluated_by_lvis(made, tmp_path):
    pytest.importorskip("lvis")
    for image in made["images"]:
        image.update(neg_category_ids=[], not_exhaustive_category_ids=[])
    for category in made["categories"]:
        category.update(frequency="c", image_count=9, instance_count=9)
    for annotation in made["annotations"]:
        annotation.update(segmentation=[[0, 0, 9, 0, 9, 9]], iscrowd=0)
    (tmp_path / "made.json").write_text(json.dumps(made))
    MetadataCatalog.get("made").evaluator_type = "lvis"
    evaluator = build_evaluator(["made"], ["bbox"], str(tmp_path))
    evaluator.reset()
    for image in made["images"]:
        objects = [a for a in made["annotations"] if a["image_id"] == image["id"]]
        found = make_detections(image["id"], 30, objects, NUM_CLASSES)
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    assert 5 < evaluator.evaluate()["bbox"]["AP"] < 95


def test_lvis_set_without_its_package_says_what_to_install(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "lvis", None)
    MetadataCatalog.get("made").evaluator_type = "lvis"
    with pytest.raises(ImportError, match="made is evaluated by LVIS.*pip install lvis"):
        build_evaluator(["made"])


def test_pascal_voc_sets_are_evaluated_by_pascal_voc(tmp_path):
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/test.txt").write_text("one\n")
    (tmp_path / "Annotations/one.xml").write_text(
        "<annotation><object><name>cat</name><pose>Left</pose><truncated>0</truncated>"
        "<difficult>0</difficult><bndbox><xmin>11</xmin><ymin>11</ymin><xmax>50</xmax>"
        "<ymax>60</ymax></bndbox></object></annotation>"
    )
    MetadataCatalog.get("made_voc").set(
        evaluator_type="pascal_voc", dirname=str(tmp_path), split="test", year=2007,
        thing_classes=["cat"],
    )  # fmt: skip
    evaluator = build_evaluator(["made_voc"], ["bbox"], str(tmp_path))
    assert isinstance(evaluator, PascalVOCDetectionEvaluator)
    evaluator.reset()
    found = Instances((99, 99), pred_boxes=Boxes(torch.tensor([[10.0, 10, 50, 60]])))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    evaluator.process([{"image_id": "one"}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
