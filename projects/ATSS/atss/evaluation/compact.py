"""Detections of a data set as arrays: 28 bytes each, gathered from all processes as tensors."""

from typing import Any, Dict, Iterable, List, Optional

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from detectron2.utils import comm

# `image` is an index into `CompactDetections.image_ids`; `box` is x, y, width, height in pixels.
DETECTION = np.dtype(
    [("image", np.int32), ("label", np.int32), ("score", np.float32), ("box", np.float32, 4)]
)
_ROUND = 1 << 16  # detections that each process sends at a time: 1.8 MB


class CompactDetections:
    """Detections of images, in the order in which the images came.

    An image counts once: what comes for the same id again, as from a sampler that repeats images
    to give every process as many, is left out.
    """

    def __init__(self) -> None:
        self._index: Dict[Any, int] = {}
        self._parts: List[np.ndarray] = []

    @property
    def image_ids(self) -> List[Any]:
        """The I images that came, with or without detections."""
        return list(self._index)

    @property
    def records(self) -> np.ndarray:
        """(D,) detections of type `DETECTION`, those of an image together."""
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.empty(0, DETECTION), *self._parts])]
        return self._parts[0]

    def add(self, image_id: Any, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Add an image.

        Args:
            image_id: of any type that can be a key.
            boxes: (D, 4) float32, corners x1, y1, x2, y2 in pixels.
            scores: (D,).
            labels: (D,) contiguous classes from 0.
        """
        if image_id in self._index:
            return
        part = np.empty(len(scores), DETECTION)
        part["image"] = self._index[image_id] = len(self._index)
        part["label"], part["score"] = labels.cpu().numpy(), scores.cpu().numpy()
        part["box"] = boxes.cpu().numpy()
        part["box"][:, 2:] -= part["box"][:, :2]
        if len(part):
            self._parts.append(part)

    def gather(self) -> Optional["CompactDetections"]:
        """Those of all processes on the main one, None elsewhere; every process must call it.

        The main process holds the result, its own part and one round of messages, whatever the
        shares of the processes are. An image that several have is taken from the first.
        """
        if comm.get_world_size() == 1:
            return self
        records, counts = self.records, comm.all_gather(len(self.records))
        ids_per_process = comm.gather(self.image_ids)
        is_main = comm.is_main_process()
        whole = np.empty(sum(counts) if is_main else 0, DETECTION)
        shares = np.split(whole, np.cumsum(counts)[:-1])  # views
        # Messages of gloo go through the host: under NCCL, no memory of a GPU is needed.
        group = comm._get_global_gloo_group()
        for start in range(0, max(counts), _ROUND):
            message = np.zeros(min(_ROUND, max(counts) - start), DETECTION)
            own = records[start : start + _ROUND]
            message[: len(own)] = own
            message = torch.from_numpy(message.view(np.uint8))
            messages = [torch.empty_like(message) for _ in counts] if is_main else None
            dist.gather(message, messages, dst=0, group=group)
            for share, received in zip(shares, messages or ()):
                target = share[start : start + _ROUND]
                target[:] = received.numpy().view(DETECTION)[: len(target)]
        return _join(ids_per_process, shares, whole) if is_main else None


def _join(
    ids_per_process: Iterable[List[Any]], shares: Iterable[np.ndarray], whole: np.ndarray
) -> CompactDetections:
    """Number the images of all processes; `shares` are views of `whole`, one for each."""
    joined = CompactDetections()
    for image_ids, records in zip(ids_per_process, shares):
        places = np.full(len(image_ids), -1, np.int32)  # -1: an earlier process has the image
        for place, image_id in enumerate(image_ids):
            if image_id not in joined._index:
                places[place] = joined._index[image_id] = len(joined._index)
        records["image"] = places[records["image"]]
    is_first = whole["image"] >= 0
    joined._parts = [whole if is_first.all() else whole[is_first]]
    return joined
