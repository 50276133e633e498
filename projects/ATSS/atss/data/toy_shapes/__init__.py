"""A rendered detection set of simple shapes, for a first training and for tests.

It is real files, PNG images and COCO JSON, so that a training on them takes the same path as one on
COCO. The default set is fixed, so that figures measured on it can be compared. Rendering needs
NumPy and OpenCV only; `atss.data` registers the set with Detectron2.
"""

from .files import SplitPaths, render_dataset, split_paths
from .images import MAX_CLASSES, ToyObject, ToyShapesOptions, coverage, render_image
from .outlines import OUTLINES, polygon_area

__all__ = [
    "MAX_CLASSES",
    "OUTLINES",
    "SplitPaths",
    "ToyObject",
    "ToyShapesOptions",
    "coverage",
    "polygon_area",
    "render_dataset",
    "render_image",
    "split_paths",
]
