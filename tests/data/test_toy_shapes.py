import dataclasses
import itertools
import json
import logging
import os
import subprocess
import sys
import time

import atss.data.toy_shapes
import cv2
import numpy as np
import pytest
from atss.data.toy_shapes import (
    MAX_CLASSES,
    OUTLINES,
    ToyObject,
    ToyShapesOptions,
    coverage,
    find_fault,
    polygon_area,
    render_dataset,
    render_scene,
    split_paths,
)
from pycocotools import mask as mask_api

SMALL = ToyShapesOptions(num_train=6, num_val=3)


def place(name: str, x: int, y: int, width: int, height: int) -> ToyObject:
    class_id = list(OUTLINES).index(name)
    polygon = OUTLINES[name] * (width, height) + (x, y)
    return ToyObject(class_id, (x, y, width, height), polygon)


def rendered_bytes(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


RENDER = """
import sys, time, types
package = types.ModuleType("atss")  # stands for the package, whose own __init__ imports PyTorch
package.__path__ = [sys.argv[1]]
sys.modules["atss"] = package
from atss.data.toy_shapes import ToyShapesOptions, files, render_dataset
if sys.argv[4] == "False":
    files.fcntl = None
time.sleep(max(0, float(sys.argv[3]) - time.time()))
print(render_dataset(sys.argv[2], ToyShapesOptions(num_train=6, num_val=3)))
print("numpy and cv2 only" if not {"torch", "detectron2"} & set(sys.modules) else "more")
"""


def start_rendering(root, start=0.0, has_locks=True):
    folder = os.path.dirname(os.path.dirname(atss.data.toy_shapes.__file__))
    command = [sys.executable, "-c", RENDER, folder, str(root), str(start), str(has_locks)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process):
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.splitlines()


def read_split(root, split):
    paths = split_paths(root, split)
    return json.loads(paths.json_file.read_text()), paths.image_root


# What is drawn


def test_default_set_has_the_numbers_of_its_specification():
    options = ToyShapesOptions()
    assert (options.num_train, options.num_val, options.image_size) == (1500, 150, 256)
    assert options.class_names == ["rectangle", "ellipse", "triangle", "rhombus", "cross", "ring"]
    assert (options.min_size, options.max_size, options.max_aspect_ratio) == (10, 180, 2)
    assert (options.min_objects, options.max_objects, options.noise) == (1, 8, 8)


def test_objects_follow_the_distributions_of_their_options():
    scenes = [render_scene(ToyShapesOptions(noise=0), "train", i)[1] for i in range(300)]
    counts = np.bincount([len(objects) for objects in scenes], minlength=9)
    boxes = np.array([item.box for objects in scenes for item in objects], float)
    sizes = np.sqrt(boxes[:, 2] * boxes[:, 3])
    ratios = boxes[:, 2] / boxes[:, 3]
    classes = np.bincount([item.class_id for objects in scenes for item in objects])

    assert counts[0] == 0 and len(counts) == 9 and counts[1:].min() > 15  # 37.5 expected
    assert len(classes) == 6 and classes.min() > 0.1 * len(boxes)
    assert sizes.min() > 9.5 and sizes.max() < 180.5  # sides are rounded to whole pixels
    # Log-uniform: the geometric middle, sqrt(10 * 180) = 42.4, halves the objects.
    assert abs(np.mean(sizes < 42.4) - 0.5) < 0.05
    assert ratios.min() > 0.5 * 0.9 and ratios.max() < 2 / 0.9  # the rounding of 7 by 14 px
    assert abs(np.mean(ratios < 1) - 0.5) < 0.05
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 256).all()


def test_noise_has_a_standard_deviation_of_eight_grey_levels():
    scenes = [
        render_scene(ToyShapesOptions(noise=noise), "val", 0)[0].astype(float) for noise in (0, 8)
    ]
    is_unclipped = (scenes[0] > 40) & (scenes[0] < 215)
    difference = (scenes[1] - scenes[0])[is_unclipped]
    assert abs(difference.std() - 8) < 0.2 and abs(difference.mean()) < 0.2


def test_background_is_smooth_and_changes_across_the_image():
    empty = ToyShapesOptions(min_objects=0, noise=0)
    index = next(i for i in range(100) if not render_scene(empty, "train", i)[1])
    image = render_scene(empty, "train", index)[0].astype(int)
    assert np.abs(np.diff(image, axis=0)).max() <= 6 and np.abs(np.diff(image, axis=1)).max() <= 6
    assert image.std(axis=(0, 1)).max() > 10


@pytest.mark.parametrize("name", OUTLINES)
@pytest.mark.parametrize("size", [(10, 7), (60, 30), (31, 62)])
def test_box_is_tight_around_the_pixels_of_its_shape(name, size):
    covered = coverage(place(name, 5, 9, *size))
    assert covered.shape == size[::-1]
    rows, columns = np.nonzero(covered.max(axis=1))[0], np.nonzero(covered.max(axis=0))[0]
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (0, size[1] - 1, 0, size[0] - 1)


@pytest.mark.parametrize("name", OUTLINES)
def test_polygon_has_the_area_of_its_pixels_and_of_its_coco_mask(name):
    item = place(name, 3, 11, 90, 120)
    area = polygon_area(item.polygon)
    mask = mask_api.decode(mask_api.frPyObjects([item.polygon.ravel().tolist()], 160, 120))[..., 0]
    assert coverage(item).sum() == pytest.approx(area, rel=0.02)
    assert mask.sum() == pytest.approx(area, rel=0.02)
    both = mask[11:131, 3:93] > 0
    assert np.mean(both == (coverage(item) > 0.5)) > 0.98  # the same pixels, not only as many


@pytest.mark.parametrize("name", ["ellipse", "ring"])
def test_round_shape_is_drawn_in_the_middle_of_its_box(name):
    covered = coverage(place(name, 3, 11, 60, 40))
    center = [
        (covered.sum(axis=1 - axis) * (np.arange(covered.shape[axis]) + 0.5)).sum() / covered.sum()
        for axis in (0, 1)
    ]
    assert center == pytest.approx([20, 30], abs=0.03)  # half a pixel of the drawing is 0.125


@pytest.mark.parametrize("name", ["ring", "frame"])
def test_hole_stays_empty_in_pixels_and_coco_mask(name):
    item = place(name, 0, 0, 100, 100)
    mask = mask_api.decode(mask_api.frPyObjects([item.polygon.ravel().tolist()], 100, 100))[..., 0]
    assert coverage(item)[40:60, 40:60].max() == 0 and mask[40:60, 40:60].max() == 0
    assert coverage(item)[50, 10] == 1 and mask[50, 10] == 1


def test_area_of_known_polygons():
    assert polygon_area(place("rectangle", 2, 3, 10, 20).polygon) == pytest.approx(200)
    assert polygon_area(place("triangle", 2, 3, 10, 20).polygon) == pytest.approx(100)
    assert polygon_area(place("cross", 2, 3, 30, 30).polygon) == pytest.approx(5 * 10 * 10)
    # A square less its hole of 0.55 of its width.
    assert polygon_area(place("frame", 0, 0, 10, 10).polygon) == pytest.approx(100 - 5.5**2)


def test_later_objects_cover_earlier_ones():
    for index in range(50):
        image, objects = render_scene(ToyShapesOptions(noise=0), "train", index)
        (x, y, width, height), polygon = objects[-1].box, objects[-1].polygon
        inside = coverage(objects[-1]) == 1
        colors = image[y : y + height, x : x + width][inside]
        assert len(polygon) and (colors == colors[0]).all()  # nothing is drawn over the last one


def test_other_options_give_more_and_smaller_objects_of_more_classes_in_larger_images():
    options = ToyShapesOptions(
        image_size=400, min_objects=20, max_objects=30, num_classes=MAX_CLASSES, max_size=40
    )
    scenes = [render_scene(options, "train", i) for i in range(10)]
    assert all(image.shape == (400, 400, 3) and 20 <= len(o) <= 30 for image, o in scenes)
    assert {item.class_id for _, objects in scenes for item in objects} == set(range(MAX_CLASSES))
    boxes = np.array([item.box for _, objects in scenes for item in objects])
    assert np.sqrt(boxes[:, 2] * boxes[:, 3]).max() < 41 and boxes[:, 0].max() > 256


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_classes": MAX_CLASSES + 1}, f"num_classes from 1 to {MAX_CLASSES}"),
        ({"num_classes": 0}, "num_classes"),
        ({"image_size": 128}, "image_size of at least 255"),  # 180 * sqrt(2) = 254.6
        ({"min_objects": 5, "max_objects": 4}, "min_objects <= max_objects"),
        ({"min_size": 200.0}, "min_size <= max_size"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio"),
        ({"noise": -1.0}, "noise"),
        ({"num_val": 0}, "num_val"),
        ({"val_seed": 0}, "seeds? that differ|val_seed that differ"),
        ({"train_seed": -1}, "seeds of at least 0"),
    ],
)
def test_impossible_options_are_refused_with_what_is_needed(changes, message):
    with pytest.raises(ValueError, match=message):
        ToyShapesOptions(**changes)


# What is written


def test_same_options_give_the_same_files_in_another_process_and_another_place(tmp_path):
    render_dataset(tmp_path / "here", SMALL)
    assert finish(start_rendering(tmp_path / "there")) == ["True", "numpy and cv2 only"]
    assert rendered_bytes(tmp_path / "here") == rendered_bytes(tmp_path / "there")


def test_seeds_change_the_images_and_splits_share_none(tmp_path):
    def image(options, split, index=0):
        return render_scene(options, split, index)[0]

    other = dataclasses.replace(SMALL, train_seed=7)
    assert (image(SMALL, "train") == image(SMALL, "train")).all()
    assert (image(SMALL, "train") != image(other, "train")).any()
    assert (image(SMALL, "val") == image(other, "val")).all()
    assert (image(SMALL, "train") != image(SMALL, "val")).any()
    assert (image(SMALL, "train") != image(SMALL, "train", index=1)).any()


def test_files_are_images_and_coco_annotations_that_record_their_seed(tmp_path):
    assert render_dataset(tmp_path / "toy", SMALL)
    for split, number, seed in (("train", 6, 0), ("val", 3, 1)):
        data, image_root = read_split(tmp_path / "toy", split)
        assert data["info"]["seed"] == seed
        assert data["info"]["options"] == dataclasses.asdict(SMALL)
        assert [c["name"] for c in data["categories"]] == SMALL.class_names
        assert [c["id"] for c in data["categories"]] == [1, 2, 3, 4, 5, 6]
        assert len(data["images"]) == number == len(os.listdir(image_root))
        for index, record in enumerate(data["images"]):
            image = cv2.imread(str(image_root / record["file_name"]))
            scene, objects = render_scene(SMALL, split, index)
            assert image.shape == (record["height"], record["width"], 3)
            assert (image == scene).all()  # PNG keeps every value
            mine = [a for a in data["annotations"] if a["image_id"] == record["id"]]
            assert [tuple(a["bbox"]) for a in mine] == [item.box for item in objects]
            assert [a["category_id"] - 1 for a in mine] == [item.class_id for item in objects]


def test_polygons_in_the_file_have_the_annotated_box_and_area(tmp_path):
    render_dataset(tmp_path / "toy", SMALL)
    data, _ = read_split(tmp_path / "toy", "train")
    assert data["annotations"]
    for annotation in data["annotations"]:
        polygon = np.reshape(annotation["segmentation"][0], (-1, 2))
        low, high = polygon.min(axis=0), polygon.max(axis=0)
        assert [*low, *(high - low)] == annotation["bbox"]
        assert polygon_area(polygon) == annotation["area"] <= np.prod(annotation["bbox"][2:])


def test_longer_set_begins_with_the_images_of_a_shorter_one():
    longer = dataclasses.replace(SMALL, num_train=600)
    first, second = (render_scene(options, "train", 5)[0] for options in (SMALL, longer))
    assert (first == second).all()


# When it is rendered again


def test_intact_set_is_reused(tmp_path, caplog):
    assert render_dataset(tmp_path / "toy", SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").rglob("*")}
    with caplog.at_level(logging.INFO):
        assert not render_dataset(tmp_path / "toy", SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").rglob("*")}
    assert "used as they are" in caplog.text


@pytest.mark.parametrize(
    "name, damage",
    [
        *itertools.product(
            ["train/000002.png", "val/000001.png", "annotations/val.json"],
            ["change", "truncate", "delete"],
        ),
        ("toy_shapes.json", "change"),
        ("toy_shapes.json", "truncate"),
    ],
)
def test_damaged_set_is_rendered_again_and_the_log_names_the_file(tmp_path, caplog, name, damage):
    root = tmp_path / "toy"
    render_dataset(root, SMALL)
    good, file = rendered_bytes(root), root / name
    if damage == "delete":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF  # the size stays the same
        file.write_bytes(content if damage == "change" else content[:100])
    with caplog.at_level(logging.INFO):
        assert render_dataset(root, SMALL)
    assert name in caplog.text
    assert rendered_bytes(root) == good
    assert not list(tmp_path.glob(".*.partial"))


def test_set_with_other_options_is_replaced(tmp_path, caplog):
    render_dataset(tmp_path / "toy", SMALL)
    other = dataclasses.replace(SMALL, num_train=2, num_classes=3)
    with caplog.at_level(logging.INFO):
        assert render_dataset(tmp_path / "toy", other)
    assert "other options" in caplog.text
    assert len(read_split(tmp_path / "toy", "train")[0]["images"]) == 2
    assert find_fault(tmp_path / "toy", other) is None
    assert "other options" in find_fault(tmp_path / "toy", SMALL)


def test_folder_that_is_not_a_toy_set_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("dear to somebody")
    with pytest.raises(ValueError, match="photos exists and is no toy set"):
        render_dataset(tmp_path / "photos", SMALL)
    assert (tmp_path / "photos" / "holiday.jpg").read_text() == "dear to somebody"


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "toy").mkdir()
    assert render_dataset(tmp_path / "toy", SMALL)
    assert find_fault(tmp_path / "toy", SMALL) is None


def test_interrupted_rendering_leaves_no_set_and_no_files(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("atss.data.toy_shapes.files.cv2.imwrite", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render_dataset(tmp_path / "toy", SMALL)
    assert not (tmp_path / "toy").exists() and not list(tmp_path.glob(".*.partial"))
    assert render_dataset(tmp_path / "toy", SMALL)


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    leftover = tmp_path / ".toy.0123.partial"
    (leftover / "train").mkdir(parents=True)
    render_dataset(tmp_path / "toy", SMALL)
    assert not leftover.exists()


def test_full_disk_is_an_error_and_not_a_set(tmp_path, monkeypatch):
    monkeypatch.setattr("atss.data.toy_shapes.files.cv2.imwrite", lambda *args: False)
    with pytest.raises(OSError, match="could not write"):
        render_dataset(tmp_path / "toy", SMALL)
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize("has_locks", [True, False])
def test_processes_that_start_at_once_end_with_one_intact_set(tmp_path, has_locks):
    start = time.time() + 1.5  # by then all have imported what they need
    processes = [start_rendering(tmp_path / "toy", start, has_locks) for _ in range(3)]
    made = [finish(process)[0] for process in processes]
    assert find_fault(tmp_path / "toy", SMALL) is None
    assert not list(tmp_path.glob(".*.partial"))
    assert made.count("True") == 1 if has_locks else "True" in made


def test_a_hundred_images_take_less_than_five_seconds(tmp_path):
    start = time.perf_counter()
    render_dataset(tmp_path / "toy", ToyShapesOptions(num_train=99, num_val=1))
    assert time.perf_counter() - start < 5  # about 0.6 s on one free core
