"""Where do images for a first training come from? A seeded renderer of a detection set.

It writes real files, PNG images and COCO JSON, so that a training on them takes the same path as
one on COCO. The default set is fixed, so that figures measured on it can be compared. Needs NumPy
and OpenCV only; `atss.data` registers the set with Detectron2.
"""

from .files import SplitPaths, find_fault, render_dataset, split_paths
from .outlines import OUTLINES, polygon_area
from .scenes import MAX_CLASSES, ToyObject, ToyShapesOptions, coverage, render_scene

__all__ = [
    "MAX_CLASSES",
    "OUTLINES",
    "SplitPaths",
    "ToyObject",
    "ToyShapesOptions",
    "coverage",
    "find_fault",
    "polygon_area",
    "render_dataset",
    "render_scene",
    "split_paths",
]
