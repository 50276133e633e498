"""Order of the training images: an endless stream, cut into global batches.

Everything here is a function of the seed and of a position in the stream. It does not depend on the
number of processes and loader workers, nor on where a run was interrupted.
"""

import itertools
import zlib
from dataclasses import dataclass
from typing import Iterator, Optional, Tuple

import numpy as np

# What a random number is for; numbers for one purpose are independent of those for another.
_SUBSET, _ORDER, _AUGMENTATION, _REPLACEMENT = range(4)

MAX_ATTEMPTS = 200  # images for a place; in place of one that cannot be used, others are drawn


@dataclass(frozen=True, eq=False)
class TrainingStream:
    """Endless stream of images, the same for every process, in global batches.

    An epoch has every image once, in an order drawn from the seed and the number of the epoch; with
    repeat factors (LVIS) it has an image as often as its factor says, rounded at random. The
    position of an element is its index in all epochs joined.

    With `is_tall`, elements wait in two buckets, and a bucket with `batch_size` elements becomes a
    batch: images of one orientation need little padding. What is left in a bucket at the end of an
    epoch waits for the next.

    Args:
        num_images: of the data set.
        batch_size: images of all processes in an iteration.
        seed: >= 0.
        is_tall: (num_images,) bool, whether an image is not wider than high; None: batches are cut
            from the stream as it is.
        shuffle: False for the order of the data set.
        repeat_factors: (num_images,) float >= 0, how often an epoch has an image on average; None
            for once.
        subset_ratio: share of the images, in (0, 1], drawn from the seed, that are trained on.
    """

    num_images: int
    batch_size: int
    seed: int
    is_tall: Optional[np.ndarray] = None
    shuffle: bool = True
    repeat_factors: Optional[np.ndarray] = None
    subset_ratio: float = 1.0

    def __post_init__(self):
        assert self.num_images > 0 and self.batch_size > 0 and self.seed >= 0, self
        assert int(self.num_images * self.subset_ratio) > 0 and self.subset_ratio <= 1, self
        for per_image in (self.is_tall, self.repeat_factors):
            assert per_image is None or per_image.shape == (self.num_images,), per_image.shape
        assert self.repeat_factors is None or self.repeat_factors[self.image_idxs].any()

    @property
    def image_idxs(self) -> np.ndarray:
        """Indices of the images that are trained on, ascending."""
        count = int(self.num_images * self.subset_ratio)
        if count == self.num_images:
            return np.arange(count)
        return np.sort(self._random(_SUBSET).permutation(self.num_images)[:count])

    @property
    def checksum(self) -> int:
        """A number that differs where another data set or sampler gives another stream."""
        value = zlib.crc32(repr((self.num_images, self.shuffle, self.subset_ratio)).encode())
        for per_image in (self.is_tall, self.repeat_factors):
            value = zlib.crc32(b"" if per_image is None else per_image.tobytes(), value)
        return value

    def batches(self, start: int = 0) -> Iterator[np.ndarray]:
        """Global batches in the order in which they fill up, from number `start` on.

        Yields:
            (batch_size, 2) int64, position and image index of each element.
        """
        size, image_idxs, bucket_of = self.batch_size, self.image_idxs, self._bucket_of
        epoch, num_before = self._before_batch(start, image_idxs)
        position, number = num_before.sum(), (num_before // size).sum()
        # What waits in the buckets from earlier epochs stands as -1; it is not yielded.
        buckets = [np.full((count % size, 2), -1) for count in num_before]
        while True:
            images = self._images_of(epoch, image_idxs)
            elements = np.stack((np.arange(position, position + len(images)), images), axis=1)
            full = []
            for i, waiting in enumerate(buckets):
                bucket = np.concatenate((waiting, elements[bucket_of[images] == i]))
                end = len(bucket) // size * size
                full.append(bucket[:end].reshape(-1, size, 2))
                buckets[i] = bucket[end:]
            batches = np.concatenate(full)
            batches = batches[np.argsort(batches[:, -1, 0])]  # by the element that filled it
            yield from batches[max(0, start - number) :]
            number += len(batches)
            position += len(images)
            epoch += 1

    def augmentation_words(self, position: int, attempt: int = 0) -> np.ndarray:
        """(4,) uint32 that seed the augmentation of an element.

        Args:
            position: of the element.
            attempt: 0, or number of the image in its place, see `image_at`.
        """
        key = (_AUGMENTATION, position, attempt)
        return np.random.SeedSequence(self.seed, spawn_key=key).generate_state(4)

    def image_at(self, position: int, image_idx: int, attempt: int) -> int:
        """Index of the image of an element, or of one drawn in its place.

        The first half of `MAX_ATTEMPTS` keeps the orientation.

        Args:
            position: of the element.
            image_idx: what `batches` gave for it.
            attempt: 0 for that, 1, 2, ... for images in place of those that could not be used.
        """
        if attempt == 0:
            return image_idx
        candidates, bucket_of = self.image_idxs, self._bucket_of
        if attempt < MAX_ATTEMPTS // 2:
            candidates = candidates[bucket_of[candidates] == bucket_of[image_idx]]
        return int(self._random(_REPLACEMENT, position, attempt).choice(candidates))

    def _before_batch(self, number: int, image_idxs: np.ndarray) -> Tuple[int, np.ndarray]:
        """An epoch from which batch `number` and all after it can be made.

        Returns:
            The epoch, and (2,) number of elements before it in each bucket. Batches with elements
            of earlier epochs come before batch `number`.
        """
        size = self.batch_size
        before = [np.zeros(2, dtype=np.int64)]  # epoch 0, 1, ..., up to the one that fills it
        for epoch in itertools.count():
            if epoch == 0 or self.repeat_factors is not None:
                count = self._count(epoch, image_idxs)
            after = before[-1] + count
            if (after // size).sum() > number:
                break
            before.append(after)
        # Back to before the first element that waits in a bucket there.
        in_batches = before[-1] // size * size
        while (before[epoch] > in_batches).any():
            epoch -= 1
        return epoch, before[epoch]

    @property
    def _bucket_of(self) -> np.ndarray:
        if self.is_tall is None:
            return np.zeros(self.num_images, dtype=np.int64)
        return self.is_tall.astype(np.int64)

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _repeated(self, random: np.random.Generator, image_idxs: np.ndarray) -> np.ndarray:
        if self.repeat_factors is None:
            return image_idxs
        factors = self.repeat_factors[image_idxs]
        whole = np.floor(factors)
        is_rounded_up = random.random(len(factors)) < factors - whole
        return np.repeat(image_idxs, (whole + is_rounded_up).astype(np.int64))

    def _images_of(self, epoch: int, image_idxs: np.ndarray) -> np.ndarray:
        """Image indices of an epoch in their order."""
        random = self._random(_ORDER, epoch)
        images = self._repeated(random, image_idxs)
        return random.permutation(images) if self.shuffle else images

    def _count(self, epoch: int, image_idxs: np.ndarray) -> np.ndarray:
        """(2,) number of an epoch's elements in each bucket."""
        images = self._repeated(self._random(_ORDER, epoch), image_idxs)
        return np.bincount(self._bucket_of[images], minlength=2)


def share_of(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Elements of a global batch that a process gets: consecutive, as many as every other."""
    size = len(batch) // world_size
    return batch[rank * size : (rank + 1) * size]
