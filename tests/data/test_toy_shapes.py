"""The toy set: what is drawn, what is written, and when it is rendered."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import atss
import cv2
import numpy as np
import pytest
from atss.data.toy_shapes import (
    MAX_CLASSES,
    OUTLINES,
    ToyObject,
    ToyShapesOptions,
    coverage,
    polygon_area,
    render_dataset,
    render_image,
    split_paths,
)
from pycocotools import mask as mask_api

SMALL = ToyShapesOptions(num_train=6, num_val=3)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The folder of a set that nobody changes."""
    return render_dataset(tmp_path_factory.mktemp("toy"), SMALL)


def place(name: str, x: int, y: int, width: int, height: int) -> ToyObject:
    class_id = list(OUTLINES).index(name)
    polygon = OUTLINES[name] * (width, height) + (x, y)
    return ToyObject(class_id, (x, y, width, height), polygon)


def coco_mask(item: ToyObject, height: int, width: int) -> np.ndarray:
    codes = mask_api.frPyObjects([item.polygon.ravel().tolist()], height, width)
    return mask_api.decode(codes)[..., 0]


def rendered_bytes(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


RENDER = """
import sys, time, types
for name in ("atss", "atss.data"):  # stand-ins for packages whose own __init__ imports PyTorch
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace("atss", sys.argv[1]).replace(".", "/")]
from atss.data.toy_shapes import ToyShapesOptions, render_dataset
time.sleep(max(0, float(sys.argv[3]) - time.time()))
print(render_dataset(sys.argv[2], ToyShapesOptions(num_train=int(sys.argv[4]), num_val=3)))
print("numpy and cv2 only" if not {"torch", "detectron2"} & set(sys.modules) else "more")
"""


def start_rendering(root, start=0.0, num_train=6):
    package = os.path.dirname(atss.__file__)
    command = [sys.executable, "-c", RENDER, package, str(root), str(start), str(num_train)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process):
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.splitlines()


def read_split(folder, split):
    paths = split_paths(folder, split)
    return json.loads(paths.json_file.read_text()), paths.image_root


# What is drawn


def test_default_set_has_the_numbers_of_its_specification():
    options = ToyShapesOptions()
    assert (options.num_train, options.num_val, options.image_size) == (1500, 150, 256)
    assert options.class_names == ["rectangle", "ellipse", "triangle", "rhombus", "cross", "ring"]
    assert (options.min_size, options.max_size, options.max_aspect_ratio) == (10, 180, 2)
    assert (options.min_objects, options.max_objects, options.noise) == (1, 8, 8)


def test_objects_follow_the_distributions_of_their_options():
    scenes = [render_image(ToyShapesOptions(noise=0), "train", i)[1] for i in range(300)]
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
        render_image(ToyShapesOptions(noise=noise), "val", 0)[0].astype(float) for noise in (0, 8)
    ]
    is_unclipped = (scenes[0] > 40) & (scenes[0] < 215)
    difference = (scenes[1] - scenes[0])[is_unclipped]
    assert abs(difference.std() - 8) < 0.2 and abs(difference.mean()) < 0.2


def test_background_is_smooth_and_changes_across_the_image():
    empty = ToyShapesOptions(min_objects=0, noise=0)
    index = next(i for i in range(100) if not render_image(empty, "train", i)[1])
    image = render_image(empty, "train", index)[0].astype(int)
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
    mask = coco_mask(item, 160, 120)
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
    mask = coco_mask(item, 100, 100)
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
        image, objects = render_image(ToyShapesOptions(noise=0), "train", index)
        (x, y, width, height), polygon = objects[-1].box, objects[-1].polygon
        inside = coverage(objects[-1]) == 1
        colors = image[y : y + height, x : x + width][inside]
        assert len(polygon) and (colors == colors[0]).all()  # nothing is drawn over the last one


def test_other_options_give_more_and_smaller_objects_of_more_classes_in_larger_images():
    options = ToyShapesOptions(
        image_size=400, min_objects=20, max_objects=30, num_classes=MAX_CLASSES, max_size=40
    )
    scenes = [render_image(options, "train", i) for i in range(10)]
    assert all(image.shape == (400, 400, 3) and 20 <= len(o) <= 30 for image, o in scenes)
    assert {item.class_id for _, objects in scenes for item in objects} == set(range(MAX_CLASSES))
    boxes = np.array([item.box for _, objects in scenes for item in objects])
    assert np.sqrt(boxes[:, 2] * boxes[:, 3]).max() < 41 and boxes[:, 0].max() > 256


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_classes": MAX_CLASSES + 1}, f"num_classes from 1 to {MAX_CLASSES}"),
        ({"num_classes": 0}, "num_classes"),
        ({"image_size": 128}, r"max_size in \[2, 90.51\], got 180.0. Change image_size"),
        ({"min_objects": 5, "max_objects": 4}, "min_objects from 0 to 4, got 5"),
        ({"min_size": 175.0, "max_size": 170.0}, r"min_size in \[2, 170.0\], got 175.0"),
        ({"max_size": float("nan")}, "max_size .*got nan"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio >= 1, got 0.5"),
        (
            {"min_size": 2.0, "max_aspect_ratio": 9.0, "max_size": 80.0},
            r"min_size in \[3.0, 80.0\]",
        ),
        ({"noise": -1.0}, "noise >= 0"),
        ({"num_val": 0}, "num_val >= 1, got 0"),
        ({"val_seed": 0}, "two different seeds"),
        ({"train_seed": -1}, "train_seed >= 0, got -1"),
    ],
)
def test_impossible_options_are_refused_with_what_is_needed(changes, message):
    with pytest.raises(ValueError, match=message):
        ToyShapesOptions(**changes)


# What is written


def test_same_options_give_the_same_files_in_another_process_and_another_place(rendered, tmp_path):
    there, imported = finish(start_rendering(tmp_path))
    assert there == str(tmp_path / rendered.name) and imported == "numpy and cv2 only"
    assert rendered_bytes(rendered) == rendered_bytes(Path(there))


def test_seeds_change_the_images_and_splits_share_none():
    def image(options, split, index=0):
        return render_image(options, split, index)[0]

    other = dataclasses.replace(SMALL, train_seed=7)
    assert (image(SMALL, "train") == image(SMALL, "train")).all()
    assert (image(SMALL, "train") != image(other, "train")).any()
    assert (image(SMALL, "val") == image(other, "val")).all()
    assert (image(SMALL, "train") != image(SMALL, "val")).any()
    assert (image(SMALL, "train") != image(SMALL, "train", index=1)).any()


def test_files_are_images_and_coco_annotations_that_record_their_seed(rendered):
    for split, number, seed in (("train", 6, 0), ("val", 3, 1)):
        data, image_root = read_split(rendered, split)
        assert data["info"]["seed"] == seed
        assert data["info"]["options"] == dataclasses.asdict(SMALL)
        assert [c["name"] for c in data["categories"]] == SMALL.class_names
        assert [c["id"] for c in data["categories"]] == [1, 2, 3, 4, 5, 6]
        assert len(data["images"]) == number == len(os.listdir(image_root))
        for index, record in enumerate(data["images"]):
            image = cv2.imread(str(image_root / record["file_name"]))
            scene, objects = render_image(SMALL, split, index)
            assert image.shape == (record["height"], record["width"], 3)
            assert (image == scene).all()  # PNG keeps every value
            mine = [a for a in data["annotations"] if a["image_id"] == record["id"]]
            assert [tuple(a["bbox"]) for a in mine] == [item.box for item in objects]
            assert [a["category_id"] - 1 for a in mine] == [item.class_id for item in objects]


def test_polygons_in_the_file_have_the_annotated_box_and_area(rendered):
    data, _ = read_split(rendered, "train")
    assert data["annotations"]
    for annotation in data["annotations"]:
        polygon = np.reshape(annotation["segmentation"][0], (-1, 2))
        low, high = polygon.min(axis=0), polygon.max(axis=0)
        assert [*low, *(high - low)] == annotation["bbox"]
        assert polygon_area(polygon) == annotation["area"] <= np.prod(annotation["bbox"][2:])


def test_longer_set_begins_with_the_images_of_a_shorter_one():
    longer = dataclasses.replace(SMALL, num_train=600)
    first, second = (render_image(options, "train", 5)[0] for options in (SMALL, longer))
    assert (first == second).all()


# When it is rendered


def test_existing_set_is_used_as_it_is_also_in_a_read_only_place(tmp_path, monkeypatch, caplog):
    folder = render_dataset(tmp_path, SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name in ("mkdir", "rename", "open"):
        monkeypatch.setattr(os, name, mock.Mock(side_effect=PermissionError))
    with caplog.at_level(logging.INFO):
        assert render_dataset(str(tmp_path), SMALL) == folder
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "used as they are" in caplog.text


def test_sets_with_other_options_or_of_another_renderer_lie_in_other_folders(tmp_path, monkeypatch):
    other = dataclasses.replace(SMALL, num_train=2, num_classes=3)
    folders = [render_dataset(tmp_path, SMALL), render_dataset(tmp_path, other)]
    assert [len(read_split(f, "train")[0]["images"]) for f in folders] == [6, 2]
    monkeypatch.setattr("atss.data.toy_shapes.files.RENDERER_VERSION", 2)
    folders.append(render_dataset(tmp_path, SMALL))
    assert sorted(folders) == sorted(tmp_path.iterdir()) and len(set(folders)) == 3


def test_other_files_in_the_folder_of_toy_sets_are_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_text("a photo")
    folder = render_dataset(tmp_path, SMALL)
    assert (tmp_path / "holiday.jpg").read_text() == "a photo"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([folder.name, "holiday.jpg"])


@pytest.mark.parametrize(
    "function, behaviour, error",
    [
        ("cv2.imwrite", {"side_effect": KeyboardInterrupt}, KeyboardInterrupt),
        ("cv2.imwrite", {"return_value": False}, OSError),  # what OpenCV does when the disk is full
        ("Path.write_text", {"side_effect": OSError("disk full")}, OSError),
        ("os.rename", {"side_effect": PermissionError}, PermissionError),
    ],
)
def test_interrupted_or_failed_rendering_leaves_nothing(
    tmp_path, monkeypatch, function, behaviour, error
):
    with monkeypatch.context() as patch:
        patch.setattr(f"atss.data.toy_shapes.files.{function}", mock.Mock(**behaviour))
        with pytest.raises(error):
            render_dataset(tmp_path, SMALL)
    assert not list(tmp_path.iterdir())
    assert render_dataset(tmp_path, SMALL).is_dir()


def test_killed_process_leaves_a_temporary_folder_that_is_not_taken_for_a_set(tmp_path):
    process = start_rendering(tmp_path, num_train=5000)
    while not list(tmp_path.glob(".rendering-*/set/train/*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".rendering-")
    folder = render_dataset(tmp_path, SMALL)
    assert len(read_split(folder, "train")[0]["images"]) == 6


def test_processes_that_start_at_once_end_with_one_complete_set(rendered, tmp_path):
    start = time.time() + 1.5  # all have imported what they need before
    processes = [start_rendering(tmp_path, start) for _ in range(3)]
    (folder,) = {finish(process)[0] for process in processes}
    assert [str(path) for path in tmp_path.iterdir()] == [folder]
    assert rendered_bytes(Path(folder)) == rendered_bytes(rendered)


def test_set_that_another_process_finished_meanwhile_is_used(rendered, tmp_path, monkeypatch):
    def rename_when_too_late(source, target):
        shutil.copytree(rendered, target)
        os.replace(source, target)  # fails, because the target is no empty folder

    monkeypatch.setattr("atss.data.toy_shapes.files.os.rename", rename_when_too_late)
    assert render_dataset(tmp_path, SMALL) == tmp_path / rendered.name
    assert [path.name for path in tmp_path.iterdir()] == [rendered.name]


def test_a_hundred_images_take_less_than_five_seconds(tmp_path):
    start = time.perf_counter()
    render_dataset(tmp_path, ToyShapesOptions(num_train=99, num_val=1))
    assert time.perf_counter() - start < 5  # about 0.6 s on one free core
