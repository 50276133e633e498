"""Loader of training batches, whose images and augmentations depend on seed and position only."""

import itertools
import logging
import random
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from detectron2.data import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper

from ..checks import check_choice, check_integer, check_range
from .stream import MAX_ATTEMPTS, TrainingStream, share_of

logger = logging.getLogger(__name__)

# Detectron2's names.
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")

Mapper = Callable[[Dict[str, Any]], Optional[Dict[str, Any]]]


class TrainLoader:
    """Endless iterable over this process's share of global batches, lists of mapped images.

    Workers start at the first `next`, so that a state may be loaded between `iter` and it.

    Args:
        dataset: images in Detectron2's format, as a list or by index.
        mapper: what is made of an image; None for one that cannot be used, which another replaces.
        stream: which images come when.
        num_workers: processes that load; 0 loads in this one.
        rank, world_size: of this process, and how many there are.
        pin_memory: put tensors into pinned memory, as in `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Union[Sequence[Dict[str, Any]], Dataset],
        mapper: Mapper,
        stream: TrainingStream,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ):
        assert stream.batch_size % world_size == 0 and 0 <= rank < world_size
        if isinstance(dataset, list):  # Detectron2 serialises it: workers share its memory
            dataset = DatasetFromList(dataset, copy=False)
        self.dataset = dataset
        self.mapper, self.stream = mapper, stream
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.rank, self.world_size = rank, world_size
        self.num_batches = 0  # handed out, not counting what workers have prefetched
        self._has_started = False

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        self._has_started = True
        size = self.stream.batch_size // self.world_size
        options = {}
        if self.num_workers:  # two batches are on their way, as single images to share the work
            options["prefetch_factor"] = max(2, -(-2 * size // self.num_workers))
        items = DataLoader(
            _MappedImages(self.dataset, self.mapper, self.stream),
            batch_size=None,
            sampler=self._elements(),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else it draws from the process's own
            **options,
        )
        items = iter(items)
        try:
            while True:
                batch = list(itertools.islice(items, size))
                self.num_batches += 1
                yield batch
        finally:
            # While the traceback of an error keeps the iterator alive, its workers would not stop,
            # and Python waits 5 s for each at its end.
            if self.num_workers:
                items._shutdown_workers()

    def state_dict(self) -> Dict[str, int]:
        """Where the loader is; the same in every process."""
        return {
            "batches": self.num_batches,
            "batch_size": self.stream.batch_size,
            "seed": self.stream.seed,
            "checksum": self.stream.checksum,
        }

    def load_state_dict(self, state: Dict[str, int]) -> None:
        """Continue where a loader was, also with another number of processes or workers.

        With another batch size it continues at the same number of images.

        Raises:
            RuntimeError: the loader has given a batch already.
        """
        if self._has_started:
            raise RuntimeError("The state of a TrainLoader must be loaded before its first batch.")
        size, num_images = self.stream.batch_size, state["batches"] * state["batch_size"]
        self.num_batches = num_images // size
        if state["seed"] != self.stream.seed:
            logger.info("The order of images keeps the checkpoint's seed, %d.", state["seed"])
            self.stream = replace(self.stream, seed=state["seed"])
        if state["checksum"] != self.stream.checksum:
            logger.warning(
                "The images of training, or how they are sampled, are not those of the checkpoint: "
                "training continues at batch %d of another order.",
                self.num_batches,
            )
        if state["batch_size"] != size:
            logger.warning(
                "A batch has %d images, in the checkpoint it had %d: the order of images continues "
                "after %d images, of %d that were trained on.",
                size,
                state["batch_size"],
                self.num_batches * size,
                num_images,
            )

    def _elements(self) -> Iterator[Tuple[int, int]]:
        for batch in self.stream.batches(self.num_batches):
            yield from map(tuple, share_of(batch, self.rank, self.world_size).tolist())


def build_train_loader(
    dataset: Union[Sequence[Dict[str, Any]], Dataset],
    mapper: Mapper,
    total_batch_size: int,
    num_workers: int = 0,
    aspect_ratio_grouping: bool = True,
    sampler: str = "TrainingSampler",
    shuffle: bool = True,
    repeat_threshold: float = 0.0,
    repeat_sqrt: bool = True,
    subset_ratio: float = 1.0,
    seed: int = -1,
    pin_memory: bool = False,
) -> TrainLoader:
    """Loader of this process for training.

    Like Detectron2's `build_detection_train_loader`, except that the same seed gives the same
    batches with any number of processes and workers, and after a training is resumed.

    Args:
        dataset: images in Detectron2's format, as a list or by index.
        mapper: what is made of an image, e.g. `NamingMapper`. What it draws at random it must take
            from the generators of python, numpy or torch's CPU.
        total_batch_size: images of all processes in an iteration.
        num_workers: loading processes of each training process.
        aspect_ratio_grouping: make batches of images that are all wider than high, or all not.
        sampler: one of `SAMPLERS`, Detectron2's names; for another, take Detectron2's loader.
        shuffle: False for the order of the data set.
        repeat_threshold: of the RepeatFactorTrainingSampler: images with a class that is in a
            smaller share of the images than this are repeated.
        repeat_sqrt: repeat them by the square root of threshold / share.
        subset_ratio: of the RandomSubsetTrainingSampler: share of the images.
        seed: of order and augmentation; a negative one is drawn, the same in every process.
        pin_memory: put tensors into pinned memory.

    Raises:
        ValueError: for a value that does not suit.
    """
    name, world_size = "The training loader", comm.get_world_size()
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "The training loader needs a list or a data set with indices, got an IterableDataset. "
            "Take detectron2.data.build_detection_train_loader for dataloader.train."
        )
    check_choice(name, "sampler", sampler, SAMPLERS, "dataloader.train.sampler")
    key = "dataloader.train.total_batch_size (SOLVER.IMS_PER_BATCH)"
    check_integer(name, "total_batch_size", total_batch_size, 1, key)
    if total_batch_size % world_size:
        raise ValueError(
            f"A batch of {total_batch_size} images cannot be shared by {world_size} processes: "
            f"give each as many. Change {key}."
        )
    repeat_factors = None
    if sampler == "RepeatFactorTrainingSampler":
        count = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        # Detectron2 0.5 only knows the square root. Factors are at least 1 either way.
        repeat_factors = count(dataset, repeat_threshold).numpy() ** (1 if repeat_sqrt else 2)
    if sampler == "RandomSubsetTrainingSampler":
        key = "dataloader.train.subset_ratio (DATALOADER.RANDOM_SUBSET_RATIO)"
        check_range(name, "subset_ratio", subset_ratio, 1 / len(dataset), 1, key)
    else:
        subset_ratio = 1.0
    if seed < 0:
        seed = int(comm.shared_random_seed())
        logger.info("The order of images has the seed %d, drawn because none was given.", seed)
    stream = TrainingStream(
        num_images=len(dataset),
        batch_size=total_batch_size,
        seed=seed,
        is_tall=_orientations(dataset) if aspect_ratio_grouping else None,
        shuffle=shuffle,
        repeat_factors=repeat_factors,
        subset_ratio=subset_ratio,
    )
    rank = comm.get_rank()
    return TrainLoader(dataset, mapper, stream, num_workers, rank, world_size, pin_memory)


def _orientations(dataset: Sequence[Dict[str, Any]]) -> Optional[np.ndarray]:
    """(num_images,) bool, whether an image is not wider than high; None if sizes are unknown."""
    images = (dataset[i] for i in range(len(dataset)))
    sizes = [(image.get("width"), image.get("height")) for image in images]
    if any(None in size for size in sizes):
        logger.warning(
            "Some images of training have no width and height, so that batches are not of one "
            "orientation each, which costs time: add them to the data set."
        )
        return None
    return np.array([width <= height for width, height in sizes])


class _MappedImages(Dataset):
    """Mapped images by (position, image index)."""

    def __init__(self, dataset: Sequence[Dict[str, Any]], mapper: Mapper, stream: TrainingStream):
        self.dataset, self.stream = dataset, stream
        self.mapper = PicklableWrapper(mapper)

    def __getitem__(self, element: Tuple[int, int]) -> Dict[str, Any]:
        if get_worker_info() is not None:
            return self._mapped(*element)
        # The model draws from the generators of this process. Numpy's alone take 100 us.
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return self._mapped(*element)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _mapped(self, position: int, image_idx: int) -> Dict[str, Any]:
        for attempt in range(MAX_ATTEMPTS):
            image = self.dataset[self.stream.image_at(position, image_idx, attempt)]
            _seed(self.stream.augmentation_words(position, attempt))
            mapped = self.mapper(image)
            if mapped is not None:
                return mapped
        image = self.dataset[image_idx]
        raise ValueError(
            f"{image.get('file_name', f'image {image_idx}')} cannot be used, nor can "
            f"{MAX_ATTEMPTS - 1} images drawn in its place: the mapper returns None for each. "
            "Change the data set or dataloader.train.mapper."
        )


def _seed(words: np.ndarray) -> None:
    """Seed the generators of python, numpy and torch's CPU."""
    random.seed(int(words[0]))
    np.random.seed(words)
    torch.default_generator.manual_seed(int(words[1]))  # torch.manual_seed also seeds the GPU


def _as_it_is(item: Any) -> Any:
    return item
