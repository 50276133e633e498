"""Data sets: registration, loading by Detectron2, and messages about faulty ones."""

import argparse
import contextlib
import copy
import dataclasses
import json
import logging
import shutil

import atss
import numpy as np
import pytest
import torch
from atss.data import (
    NamingMapper,
    ToyShapesOptions,
    add_dataset_arguments,
    check_coco_json,
    check_dataset_dicts,
    load_dataset_dicts,
    register_coco_json,
    register_from_arguments,
    register_toy_shapes,
)
from atss.data.classes import common_classes
from atss.data.toy_shapes import render_dataset, render_image
from atss.model_zoo import get_config
from PIL import Image
from pycocotools import mask as mask_api

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

SMALL = ToyShapesOptions(image_size=96, max_size=60, num_train=8, num_val=4)


@pytest.fixture(autouse=True)
def catalogs():
    """Leave Detectron2's global catalogs as they were; start without sets of other tests."""
    before = [(catalog, dict(catalog.data)) for catalog in (DatasetCatalog, MetadataCatalog)]
    for catalog, entries in before:
        catalog.data = {name: e for name, e in entries.items() if not name.startswith("own_")}
    yield
    for catalog, entries in before:
        catalog.data = entries


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    """A folder of toy sets that has the small one."""
    root = tmp_path_factory.mktemp("data") / "toy"
    render_dataset(root, SMALL)
    return root


class Own:
    """A valid COCO set of two 40x30 images: category ids 3 and 7, out of order and with a gap."""

    def __init__(self, folder):
        self.folder, self.images = folder, folder / "images"
        self.files = folder / "set.json", self.images
        self.images.mkdir()
        for name in ("a.jpg", "b.jpg"):
            Image.new("RGB", (40, 30)).save(self.images / name)
        self.data = {
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
            "images": [
                {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30},
                {"id": 2, "file_name": "b.jpg", "width": 40, "height": 30},
            ],
            "annotations": [annotation(11, 1, 7), annotation(12, 1, 3), annotation(13, 2, 3)],
        }
        self.write()

    def write(self, name="set.json"):
        """Write the data as they are now; returns the annotation file and the image folder."""
        (self.folder / name).write_text(json.dumps(self.data))
        return self.folder / name, self.images


@pytest.fixture
def own(tmp_path):
    return Own(tmp_path)


def annotation(number, image, category, bbox=(5, 6, 10, 8)):
    x, y, width, height = bbox
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": list(bbox),
        "area": width * height, "iscrowd": 0,
    }  # fmt: skip


@contextlib.contextmanager
def raises_with(*words):
    """Expect a ValueError whose message has all these words."""
    with pytest.raises(ValueError) as error:
        yield error
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def parse(*arguments, eval_only=False):
    parser = argparse.ArgumentParser()
    add_dataset_arguments(parser)
    args = parser.parse_args([str(a) for a in arguments])
    args.eval_only = eval_only
    return args


def both_splits(train, val):
    return parse(
        *("--train-json", train[0], "--train-images", train[1]),
        *("--val-json", val[0], "--val-images", val[1]),
    )


# The toy set in Detectron2


def test_mapper_gives_the_drawn_image_boxes_and_masks(toy_root):
    train, _ = register_toy_shapes(toy_root, SMALL)
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
    dataset = DatasetCatalog.get(train)
    assert len(dataset) == SMALL.num_train
    for index, record in enumerate(dataset):
        image, objects = render_image(SMALL, "train", index)
        mapped = mapper(record)
        instances = mapped["instances"]
        assert (mapped["image"].permute(1, 2, 0).numpy() == image).all()
        boxes = torch.tensor([item.box for item in objects], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(instances.gt_boxes.tensor, boxes)
        assert instances.gt_classes.tolist() == [item.class_id for item in objects]
        # The rectangle that encloses each polygon mask is the box.
        masks = instances.gt_masks.get_bounding_boxes().tensor
        torch.testing.assert_close(masks, boxes, atol=0.01, rtol=0)


def test_ground_truth_given_as_detections_has_an_ap_of_100(toy_root):
    _, val = register_toy_shapes(toy_root, SMALL)
    evaluator = COCOEvaluator(val, ("bbox", "segm"), distributed=False)  # before anything is loaded
    evaluator.reset()
    for record in DatasetCatalog.get(val):
        found = Instances((record["height"], record["width"]))
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(boxes)
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        found.scores = torch.ones(len(found))
        found.pred_masks = torch.stack([to_mask(a, 96) for a in record["annotations"]])
        evaluator.process([record], [{"instances": found}])
    results = evaluator.evaluate()
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(100), results[task]
    wanted = [f"AP-{name}" for name in SMALL.class_names]
    assert set(wanted) <= set(results["bbox"])


def to_mask(record, size):
    codes = mask_api.frPyObjects(record["segmentation"], size, size)
    return torch.from_numpy(mask_api.decode(mask_api.merge(codes)).astype(bool))


def test_registering_again_is_free_and_with_other_files_or_classes_an_error(toy_root, tmp_path):
    names = register_toy_shapes(toy_root, SMALL)
    assert names == ("toy_shapes_train", "toy_shapes_val") == register_toy_shapes(toy_root, SMALL)
    shutil.copytree(toy_root, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"toy_shapes_train is already registered.*copy"):
        register_toy_shapes(tmp_path / "copy", SMALL)
    with pytest.raises(ValueError, match="already registered"):
        register_toy_shapes(toy_root, dataclasses.replace(SMALL, num_classes=2))
    other = register_toy_shapes(tmp_path / "copy", SMALL, name="second")
    assert other == ("second_train", "second_val")


def test_default_place_follows_detectron2s_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    _, val = register_toy_shapes(options=SMALL, name="mine")
    json_file = MetadataCatalog.get(val).json_file
    assert json_file.startswith(str(tmp_path / "data" / "toy_shapes"))
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(tmp_path)
    register_toy_shapes(options=SMALL, name="here")
    assert list((tmp_path / "datasets" / "toy_shapes").glob("*/val"))


# Your files


def test_classes_are_numbered_by_category_id_as_detectron2_does(own):
    summary = register_coco_json("mine", *own.files)
    assert summary == ([3, 7], ["cat", "dog"], 2, 3, 0)
    records = DatasetCatalog.get("mine")
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "dog"]
    assert [a["category_id"] for a in records[0]["annotations"]] == [1, 0]


def test_set_that_the_user_registered_before_may_be_registered_again(own):
    files = str(own.folder / "set.json"), str(own.images)
    register_coco_instances("mine", {}, *files)
    register_coco_json("mine", *files)
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "dog"]
    DatasetCatalog.register("made_in_python", lambda: [])
    with pytest.raises(ValueError, match="made_in_python is already registered"):
        register_coco_json("made_in_python", *files)


def change(**changes):
    """Change keys of annotation 12 of image 1; None removes a key."""

    def apply(data):
        data["annotations"][1].update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del data["annotations"][1][key]

    return apply


NAN, INF = float("nan"), float("inf")
PROBLEMS = {
    "NaN": (change(bbox=[NAN, 1, 2, 3]), ["annotation 12 of image 1", "[nan, 1, 2, 3]", "finite"]),
    "infinite": (change(bbox=[0, 1, INF, 3]), ["annotation 12 of image 1", "inf", "finite"]),
    "negative width": (
        change(bbox=[9, 9, -3, 4]),
        ["annotation 12 of image 1", "[9, 9, -3, 4]", "x2 < x1"],
    ),
    "negative height": (change(bbox=[9, 9, 3, -4]), ["annotation 12", "y2 < y1"]),
    "three numbers": (change(bbox=[9, 9, 3]), ["annotation 12 of image 1", "four numbers"]),
    "text": (change(bbox=["9", 9, 3, 3]), ["annotation 12 of image 1", "four numbers"]),
    "no box": (change(bbox=None), ["annotation 12 of image 1", '"bbox"']),
    "no annotation id": (change(id=None), ["annotation number 1 (from 0) of image 1", '"id"']),
    "class": (change(category_id=9), ["annotation 12 of image 1", "category_id 9", "categories"]),
    "image": (change(image_id=5), ["annotation 12 of image 5", "no image"]),
    "ignore": (change(ignore=1), ["annotation 12 of image 1", '"ignore"', "iscrowd"]),
    "same id": (change(id=11), ["annotation id 11", "more than once"]),
    "text as id": (change(id="x"), ["annotation id 'x'", "whole number"]),
    "no categories": (lambda data: data.pop("categories"), ['"categories"']),
    "empty categories": (lambda data: data["categories"].clear(), ["no classes"]),
    "unnamed category": (lambda data: data["categories"][0].pop("name"), ["category 7", '"name"']),
    "same category": (lambda d: d["categories"].append(d["categories"][0]), ["category id 7"]),
    "no images": (lambda data: data["images"].clear(), ["no images"]),
    "same image": (lambda data: data["images"].append(data["images"][0]), ["image id 1"]),
    "no size": (lambda data: data["images"][1].pop("height"), ["image 2", '"height"']),
    "no annotations": (lambda data: data.pop("annotations"), ['"annotations"', "a list"]),
    "wrong list": (lambda data: data.update(annotations=[1]), ['"annotations"', "objects"]),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_is_named_with_file_image_and_annotation(own, problem):
    spoil, words = PROBLEMS[problem]
    spoil(own.data)
    with raises_with(*words, "set.json"):
        check_coco_json(*own.write())


def test_many_problems_are_counted_and_the_first_shown(own):
    own.data["annotations"] = [annotation(i, 1, 3, (0, 0, -1, 1)) for i in range(1, 21)]
    with raises_with("20 such problems", "annotation 1 ", "annotation 3 ", "17 more") as error:
        check_coco_json(*own.write())
    assert "annotation 4 " not in str(error.value)


def test_missing_file_folder_and_images_are_named(own):
    with pytest.raises(FileNotFoundError, match="no annotation file .*nowhere.json"):
        check_coco_json(own.folder / "nowhere.json", own.images)
    with pytest.raises(FileNotFoundError, match="no image folder .*pictures"):
        check_coco_json(own.folder / "set.json", own.folder / "pictures")
    (own.images / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"set.json are missing \(1\): .*b.jpg"):
        check_coco_json(*own.files)


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "\x80"])
def test_file_that_is_not_coco_json_is_refused(tmp_path, text):
    (tmp_path / "set.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"set.json is not (valid JSON|a COCO file)"):
        check_coco_json(tmp_path / "set.json", tmp_path)


def test_keys_of_the_evaluation_are_asked_for_before_the_training(own):
    change(area=None, iscrowd=None)(own.data)
    files = own.write()
    assert check_coco_json(*files).num_annotations == 3  # enough to train on
    with raises_with("annotation 12 of image 1", '"area" and "iscrowd"', "evaluated"):
        check_coco_json(*files, for_evaluation=True)


def test_annotation_id_that_the_evaluation_misreads_is_warned_about(own, caplog):
    own.data["annotations"][0]["id"] = 0
    check_coco_json(*own.write(), for_evaluation=True)
    assert "id 0" in caplog.text and "set.json" in caplog.text


def test_boxes_without_area_are_counted_in_one_line(own, caplog):
    empty = [(5, 5, 0, 4), (5, 5, 4, 0), (40, 5, 9, 9), (-9, 5, 9, 9)]  # two of them lie outside
    own.data["annotations"] += [annotation(20 + i, 2, 3, box) for i, box in enumerate(empty)]
    with caplog.at_level(logging.WARNING):
        assert check_coco_json(*own.write(), for_evaluation=True).num_empty_boxes == 4
    assert len(caplog.records) == 1 and "4 boxes without area" in caplog.text
    assert "count as missed objects" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # registration counts nothing, loading does
        assert register_coco_json("mine", *own.files).num_empty_boxes == 4
        load_dataset_dicts("mine", 2)
    assert len(caplog.records) == 1 and "4 boxes without area in their image are" in caplog.text


def test_detectron2_drops_the_boxes_that_are_counted_and_no_others(own):
    boxes = [
        *[(5, 5, 0, 4), (5, 5, 4, 0), (40, 5, 9, 9), (-9, 5, 9, 9)],  # without area in the image
        *[(39, 5, 9, 9), (-9, 5, 10, 9), (5, 5, 1e-3, 4)],  # with a little
    ]
    own.data["annotations"] = [annotation(i, 1, 3, box) for i, box in enumerate(boxes, start=1)]
    assert register_coco_json("few", *own.write()).num_empty_boxes == 4

    loaded = DatasetCatalog.get("few")
    mapped = DatasetMapper(True, augmentations=[], image_format="BGR")(copy.deepcopy(loaded[0]))
    assert len(mapped["instances"]) == 3
    assert len(check_dataset_dicts(loaded, 2, "few")[0]["annotations"]) == 3


def test_boxes_that_reach_out_of_their_image_are_counted_in_one_line(own, caplog):
    boxes = [(30, 5, 20, 8), (-3, 5, 9, 9), (-0.5, 0, 40.8, 30)]  # the last within rounding
    own.data["annotations"] += [annotation(20 + i, 2, 3, box) for i, box in enumerate(boxes)]
    check_coco_json(*own.write(), for_evaluation=True)
    assert len(caplog.records) == 1
    assert "set.json: 2 boxes reach out of their image. Training clips them" in caplog.text


def test_category_names_may_be_numbers(own):
    own.data["categories"][0]["name"] = 7
    files = own.write()
    register_coco_json("mine", *files)
    records = DatasetCatalog.get("mine")
    assert [a["category_id"] for a in records[0]["annotations"]] == [1, 0]
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "7"]
    assert MetadataCatalog.get("mine").evaluator_type == "coco"


def test_byte_order_mark_is_named_because_cocos_own_reader_refuses_it(own):
    own.files[0].write_text(json.dumps(own.data), encoding="utf-8-sig")
    with raises_with("set.json", "byte order mark", "UTF-8 without"):
        check_coco_json(*own.files)


# Image files


def truncate(file):
    Image.fromarray(np.random.randint(0, 255, (30, 40, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-200])


def rotate(file):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(file, exif=exif)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (rotate, ["rotation in its EXIF", "40x30", "remove the EXIF orientation", "swap width"]),
        (lambda file: Image.new("RGB", (50, 30)).save(file), ["50x30", "40x30"]),
        (lambda file: file.write_bytes(b"no image"), ["cannot be read", "replace it"]),
        (
            lambda file: Image.fromarray(np.full((30, 40), 9999, np.uint16)).save(file, "PNG"),
            ["more than 8 bits", "convert"],
        ),
    ],
    ids=["EXIF", "size", "text", "16 bit"],
)
def test_what_the_header_of_an_image_tells_is_said_before_training(own, spoil, words):
    spoil(own.images / "b.jpg")
    with raises_with("b.jpg", "set.json", *words):
        check_coco_json(*own.files)
    entry = {**own.data["images"][1], "file_name": str(own.images / "b.jpg")}
    with raises_with("b.jpg", "zoo", *words):
        check_dataset_dicts([entry], 1, "zoo")


def test_rotated_image_whose_annotations_say_so_is_fine(own):
    rotate(own.images / "b.jpg")
    own.data["images"][1].update(width=30, height=40)
    assert check_coco_json(*own.write()).num_images == 2


def test_truncated_image_is_named_where_it_is_read(own):
    truncate(own.images / "b.jpg")
    register_coco_json("mine", *own.files)  # the header is good
    mapper = NamingMapper(True, augmentations=[], image_format="BGR")
    entry = DatasetCatalog.get("mine")[1]
    with raises_with("b.jpg", "truncated", "Replace the file"):
        mapper(entry)


# Number of classes


def test_number_of_classes_comes_from_the_data_and_is_logged(caplog):
    sources = [("a.json", ["cat", "dog"]), ("b.json", ["cat", "dog"])]
    with caplog.at_level(logging.INFO):
        assert common_classes(sources) == ["cat", "dog"]
    assert "2 classes, from a.json: cat, dog" in caplog.text
    assert common_classes(sources, num_classes=2) == ["cat", "dog"]
    assert common_classes([], num_classes=2) is None


def test_different_classes_of_training_and_validation_are_an_error():
    train = ("a.json", ["cat", "dog"])
    with pytest.raises(ValueError, match=r"a.json and b.json.*class 1 is 'dog'.*'cow'"):
        common_classes([train, ("b.json", ["cat", "cow"])])
    with pytest.raises(ValueError, match=r"2 classes in the one, 1 in the other"):
        common_classes([train, ("b.json", ["cat"])])


# Options of the tools


def test_own_files_replace_the_sets_of_the_config(own):
    args = both_splits(own.files, own.write("val.json"))
    found = register_from_arguments(args, ["coco_2017_train"], ["coco_2017_val"])
    assert found == (("own_train",), ("own_val",), ["cat", "dog"])
    assert len(DatasetCatalog.get("own_val")) == 2
    assert register_from_arguments(args) == found  # once more in the same process
    with pytest.raises(ValueError, match="num_classes=80.*set.json has 2 classes"):
        register_from_arguments(args, num_classes=80)


def test_own_validation_files_must_have_what_the_evaluation_needs(own):
    change(area=None)(own.data)
    files = own.write()
    with pytest.raises(ValueError, match='annotation 12 of image 1 needs "area" to be evaluated'):
        register_from_arguments(both_splits(files, files))


def test_own_files_with_different_classes_are_refused(own):
    own.data["categories"][0]["name"] = "cow"
    args = both_splits(own.files, own.write("val.json"))
    with pytest.raises(ValueError, match=r"set.json and .*val.json have different categories"):
        register_from_arguments(args)


def test_training_needs_no_validation_set_and_evaluation_no_training_set(own, caplog):
    files = own.files
    trained = register_from_arguments(parse("--train-json", files[0], "--train-images", files[1]))
    assert trained.train == ("own_train",) and trained.val == () and len(trained.class_names) == 2
    assert "nothing will be evaluated" in caplog.text
    val = parse("--val-json", files[0], "--val-images", files[1], eval_only=True)
    evaluated = register_from_arguments(val)
    assert evaluated.train == () and evaluated.val == ("own_val",)
    assert evaluated.class_names == trained.class_names


@pytest.mark.parametrize(
    "arguments, eval_only, message",
    [
        (["--train-json", "x"], False, "--train-json needs --train-images"),
        (["--val-images", "x"], False, "--val-images needs --val-json"),
        (["--val-json", "x", "--val-images", "y"], False, "without --train-json"),
        (["--train-json", "x", "--train-images", "y"], True, "--eval-only.* needs --val-json"),
    ],
)
def test_options_that_belong_together_are_asked_for_together(arguments, eval_only, message):
    with pytest.raises(ValueError, match=message):
        register_from_arguments(parse(*arguments, eval_only=eval_only))


def test_sets_of_the_config_are_registered_or_checked(toy_root, tmp_path, monkeypatch):
    known = register_toy_shapes(toy_root, SMALL)
    found = register_from_arguments(parse(), [known[0]], [known[1]], num_classes=6)
    assert found == ((known[0],), (known[1],), SMALL.class_names)
    with pytest.raises(ValueError, match="num_classes=80.*toy_shapes_train has 6 classes"):
        register_from_arguments(parse(), *known, num_classes=80)
    with pytest.raises(ValueError, match="nonsense is not registered.*toy_shapes_train"):
        register_from_arguments(parse(), "nonsense", known[1])
    with pytest.raises(ValueError, match="different categories"):
        json_file = tmp_path / "other.json"
        json_file.write_text("{}")
        register_coco_instances("other", {"thing_classes": ["a"]}, str(json_file), str(tmp_path))
        register_from_arguments(parse(), known[0], "other")


def test_toy_set_of_the_config_is_rendered_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("atss.data.registration.ToyShapesOptions", lambda: SMALL)  # in less time
    found = register_from_arguments(parse(), ("toy_shapes_train",), ("toy_shapes_val",))
    assert len(found.class_names) == 6 and list((tmp_path / "toy_shapes").glob("*/train"))


def test_toy_set_is_known_to_whoever_imports_the_package_and_rendered_when_loaded(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("atss.data.registration.ToyShapesOptions", lambda: SMALL)  # in less time
    atss.defer_toy_shapes()
    assert "toy_shapes_train" in DatasetCatalog and not list(tmp_path.iterdir())
    cfg = get_config("toy/atss_toy")  # as Detectron2's tools build it
    cfg.dataloader.test.num_workers = 0
    assert len(instantiate(cfg.dataloader.test)) == SMALL.num_val
    evaluator = instantiate(cfg.dataloader.evaluator)
    assert evaluator._metadata.json_file.startswith(str(tmp_path))


def test_set_without_a_coco_file_is_evaluated_with_one_in_the_output_folder(own):
    entry = {**record([0, 0, 9, 9]), "file_name": str(own.images / "a.jpg")}
    DatasetCatalog.register("made_in_python", lambda: [entry])
    MetadataCatalog.get("made_in_python").set(thing_classes=["cat"])
    cfg = get_config("toy/atss_toy")
    cfg.dataloader.test.dataset.names = ["made_in_python"]
    cfg.train.output_dir = str(own.folder / "out")
    instantiate(cfg.dataloader.evaluator)
    assert list((own.folder / "out" / "inference").glob("made_in_python*.json"))


def test_missing_files_of_a_registered_set_are_named_before_training(tmp_path):
    register_coco_instances("far", {}, str(tmp_path / "far.json"), str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"far needs .*far.json.*DETECTRON2_DATASETS"):
        register_from_arguments(parse(), "far", ())
    # Evaluation does not ask for the training set.
    assert register_from_arguments(parse(eval_only=True), "far", ()).class_names is None


# Sets registered in Python


def record(*boxes, mode=BoxMode.XYXY_ABS, classes=None, **more):
    classes = classes or [0] * len(boxes)
    return {
        "image_id": 5, "width": 40, "height": 30, **more,
        "annotations": [
            {"bbox": box, "bbox_mode": mode, "category_id": class_id, "iscrowd": 0}
            for box, class_id in zip(boxes, classes)
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    "image, words",
    [
        (record([0, 0, 9, 9], [0, NAN, 9, 9]), ["annotation 1 (from 0) of image 5", "nan"]),
        (record([0, 0, INF, 9]), ["annotation 0", "inf", "finite"]),
        (record([9, 0, 5, 9]), ["[9, 0, 5, 9]", "x2 < x1"]),
        (record(np.array([9.0, 0, 5, 9])), ["[9.0, 0.0, 5.0, 9.0]", "x2 < x1"]),
        (record([0, 0, -5, 9], mode=BoxMode.XYWH_ABS), ["[0, 0, -5, 9]", "negative size"]),
        (record([0, 0, 5]), ["four numbers"]),
        (record(None), ["four numbers"]),
        (record([0, 0, 5, 9, 30], mode=BoxMode.XYWHA_ABS), ["bbox_mode", "XYXY_ABS"]),
        (record([0, 0, 9, 9], classes=[3]), ["category_id 3", "0 to 2"]),
        (record([0, 0, 9, 9], classes=[-1]), ["category_id -1", "0 to 2"]),
        (record([0, 0, 9, 9], classes=[1.5]), ["category_id 1.5"]),
    ],
)
def test_faulty_record_is_named_with_data_set_image_and_annotation(image, words):
    with raises_with(*words, "image 5", "data set zoo"):
        check_dataset_dicts([record(), image], 3, "zoo")


def test_good_records_come_back_as_they_are():
    records = [record([0, 0, 9, 9], np.float32([1, 2, 3, 4]), classes=[2, np.int64(0)]), {"id": 1}]
    checked = check_dataset_dicts(records, 3, "zoo")
    assert [a is b for a, b in zip(checked, records)] == [True, True]


@pytest.mark.parametrize("outline", [None, [], "missing"])
def test_objects_without_outlines_are_refused_for_a_mask_head(outline):
    good, bad = record([0, 0, 9, 9]), record([0, 0, 9, 9], [1, 1, 5, 5])
    for annotation in (*good["annotations"], *bad["annotations"]):
        annotation["segmentation"] = [[0, 0, 9, 0, 9, 9]]
    assert check_dataset_dicts([good, bad], 3, "zoo", with_masks=True) == [good, bad]
    bad["annotations"][1]["segmentation"] = outline
    if outline == "missing":
        del bad["annotations"][1]["segmentation"]
    check_dataset_dicts([good, bad], 3, "zoo")
    with raises_with("annotation 1", "no segmentation, which a mask head", "MODEL.MASK_ON", "zoo"):
        check_dataset_dicts([good, bad], 3, "zoo", with_masks=True)


def test_boxes_without_area_are_dropped_from_a_copy_and_counted(caplog):
    records = [record([0, 0, 9, 9], [4, 4, 4, 9], [50, 4, 60, 9]), record([1, 1, 2, 2])]
    before = copy.deepcopy(records)
    checked = check_dataset_dicts(records, 1, "zoo")
    assert [len(image["annotations"]) for image in checked] == [1, 1]
    assert checked[0]["annotations"][0]["bbox"] == [0, 0, 9, 9]
    assert records == before
    assert "zoo: 2 boxes without area" in caplog.text and len(caplog.records) == 1


def test_missing_images_of_a_record_are_named(tmp_path):
    records = [record(file_name=str(tmp_path / f"{i}.jpg")) for i in range(5)]
    with pytest.raises(
        FileNotFoundError, match=r"zoo are missing \(5\): .*0.jpg.*2.jpg; and 2 more"
    ):
        check_dataset_dicts(records, 1, "zoo")
    check_dataset_dicts([record(file_name="s3://bucket/0.jpg")], 1, "zoo")  # not ours to fetch


def test_loading_checks_joins_and_leaves_out_images_without_objects(toy_root, caplog):
    train, val = register_toy_shapes(toy_root, SMALL)
    empty = {**DatasetCatalog.get(val)[0], "annotations": []}
    DatasetCatalog.register("empty", lambda: [empty])
    MetadataCatalog.get("empty").thing_classes = SMALL.class_names
    assert len(load_dataset_dicts(train, 6)) == 8
    assert len(load_dataset_dicts([train, val, "empty"], 6)) == 12
    assert len(load_dataset_dicts([train, val, "empty"], 6, filter_empty=False)) == 13
    with pytest.raises(ValueError, match="No image with an object is left to train on in empty"):
        load_dataset_dicts("empty", 6)
    with pytest.raises(ValueError, match=r"category_id \d, and the model knows 0 to 1"):
        load_dataset_dicts(train, 2)
