"""Toy images: options, random objects, and their drawing on a smooth background with noise.

Everything follows from a seed and the image's number.
"""

import dataclasses
import math
from typing import List, NamedTuple, Tuple

import cv2
import numpy as np

from ...checks import check_integer, check_range
from .outlines import OUTLINES

MAX_CLASSES = len(OUTLINES)
SUPERSAMPLING = 4  # shapes are drawn this many times larger and reduced, for smooth edges
BACKGROUND_CELLS = 3  # random colours along each side of the background, blended smoothly


@dataclasses.dataclass(frozen=True)
class ToyShapesOptions:
    """What a toy set contains; two sets with equal options have equal files.

    An object's size is the square root of its box area, its aspect ratio is width / height. Both
    are drawn log-uniformly, then the sides are rounded to whole pixels. Every shape lies inside its
    image as a whole, and later shapes cover earlier ones: 4% (train) and 2% (val) of the objects in
    the default set are hidden completely. They stay in the annotations, so AP cannot reach 100. An
    image depends only on its number and the seed of its split: the first images of a long set are
    those of a short one.

    Attributes:
        image_size: side S of the square images, in pixels.
        num_train, num_val: images per split.
        min_objects, max_objects: objects per image, drawn uniformly, both inclusive.
        num_classes: how many of `OUTLINES`, from the first; at most `MAX_CLASSES` (20).
        min_size, max_size: range of object sizes, in pixels.
        max_aspect_ratio: aspect ratios lie between 1 / max_aspect_ratio and max_aspect_ratio.
        noise: standard deviation of the Gaussian noise on every value, in grey levels.
        train_seed, val_seed: seeds of the two splits.

    Raises:
        ValueError: a value is out of range, or the largest object would not fit into the image.
    """

    image_size: int = 256
    num_train: int = 1500
    num_val: int = 150
    min_objects: int = 1
    max_objects: int = 8
    num_classes: int = 6
    min_size: float = 10.0
    max_size: float = 180.0
    max_aspect_ratio: float = 2.0
    noise: float = 8.0
    train_seed: int = 0
    val_seed: int = 1

    def __post_init__(self) -> None:
        owner = "ToyShapesOptions"
        positive = ("image_size", "num_train", "num_val", "max_objects")
        for name in (*positive, "train_seed", "val_seed"):
            check_integer(owner, name, getattr(self, name), int(name in positive), name)
        counts = "min_objects or max_objects"
        check_integer(owner, "min_objects", self.min_objects, 0, counts, high=self.max_objects)
        check_integer(owner, "num_classes", self.num_classes, 1, "num_classes", high=MAX_CLASSES)
        check_range(owner, "max_aspect_ratio", self.max_aspect_ratio, 1, key="max_aspect_ratio")
        # The longest side fits into the image, the shortest has at least one pixel.
        sizes = "image_size, min_size, max_size or max_aspect_ratio"
        stretch = math.sqrt(self.max_aspect_ratio)
        largest = round(self.image_size / stretch, 2)
        check_range(owner, "max_size", self.max_size, 2, largest, sizes)
        check_range(owner, "min_size", self.min_size, max(2, stretch), self.max_size, sizes)
        check_range(owner, "noise", self.noise, 0, key="noise")
        if self.train_seed == self.val_seed:
            raise ValueError(
                f"{owner} needs two different seeds, got train_seed and val_seed {self.val_seed}: "
                "training and validation would have the same images."
            )

    @property
    def class_names(self) -> List[str]:
        """Names of the classes; the category id in the files is the index plus one."""
        return list(OUTLINES)[: self.num_classes]


class ToyObject(NamedTuple):
    """A drawn shape, including the parts that later shapes cover.

    `box` is x, y, width, height in whole pixels. `polygon` (corners, 2) is the outline in
    continuous pixel coordinates, in which the first pixel covers [0, 1]; it touches all sides of
    the box.
    """

    class_id: int
    box: Tuple[int, int, int, int]
    polygon: np.ndarray


def sample_objects(rng: np.random.Generator, options: ToyShapesOptions) -> List[ToyObject]:
    """Objects of one image in drawing order: later ones may cover earlier ones."""
    outlines = list(OUTLINES.values())
    objects = []
    for _ in range(rng.integers(options.min_objects, options.max_objects + 1)):
        class_id = int(rng.integers(options.num_classes))
        size = math.exp(rng.uniform(math.log(options.min_size), math.log(options.max_size)))
        widening = math.exp(rng.uniform(-0.5, 0.5) * math.log(options.max_aspect_ratio))
        width, height = round(size * widening), round(size / widening)
        x = int(rng.integers(options.image_size - width + 1))
        y = int(rng.integers(options.image_size - height + 1))
        polygon = np.round(outlines[class_id] * (width, height) + (x, y), 2)
        objects.append(ToyObject(class_id, (x, y, width, height), polygon))
    return objects


def coverage(toy_object: ToyObject) -> np.ndarray:
    """(height, width) part of each pixel of the object's box that the shape covers, in [0, 1]."""
    x, y, width, height = toy_object.box
    canvas = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    # OpenCV counts from the centre of the first pixel and takes fixed-point corners (8 bits here).
    corners = (toy_object.polygon - (x, y)) * SUPERSAMPLING - 0.5
    cv2.fillPoly(canvas, [np.round(corners * 256).astype(np.int32)], 255, shift=8)
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


def draw_image(
    rng: np.random.Generator, objects: List[ToyObject], options: ToyShapesOptions
) -> np.ndarray:
    """(S, S, 3) uint8 image of the objects, in random colours, on a smooth random background."""
    side = options.image_size
    cells = rng.uniform(0, 255, (BACKGROUND_CELLS, BACKGROUND_CELLS, 3)).astype(np.float32)
    image = cv2.resize(cells, (side, side), interpolation=cv2.INTER_CUBIC)
    for toy_object in objects:
        x, y, width, height = toy_object.box
        color = rng.uniform(0, 255, 3).astype(np.float32)
        patch = image[y : y + height, x : x + width]
        patch += coverage(toy_object)[:, :, None] * (color - patch)
    if options.noise:
        image += options.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def render_image(
    options: ToyShapesOptions, split: str, index: int
) -> Tuple[np.ndarray, List[ToyObject]]:
    """Image number `index` (from 0) of a split, (S, S, 3) uint8 BGR, and its objects."""
    rng = np.random.default_rng([getattr(options, f"{split}_seed"), index])
    objects = sample_objects(rng, options)
    return draw_image(rng, objects, options), objects
