"""Losses that are not finite: the batch is kept for another look, and the run stops or skips it."""

import logging
import os
from typing import Any, Dict, List, Optional

import torch
from torch import nn

from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from ..checkpoint.files import write_checkpoint
from ..checks import check_integer
from .step_report import StepReport

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Stops a run at a loss that is not finite, or skips the update of a few such steps.

    Args:
        folder: where the batch is written, with the weights before the update; None writes none.
        max_skips: so many steps in a row may be skipped; 0 stops at the first.
        dtype: that autocast computes in, for the message; None for full precision.

    Attributes:
        num_skipped: skipped steps in a row.
        total_skipped: all skipped steps.

    Raises:
        TypeError, ValueError: if `max_skips` is no integer of 0 or more.
    """

    def __init__(
        self,
        folder: Optional[str] = None,
        max_skips: int = 0,
        dtype: Optional[torch.dtype] = None,
    ):
        key = "train.max_nonfinite_steps (SOLVER.MAX_NONFINITE_STEPS)"
        self.max_skips = check_integer("A run", "number of skipped steps", max_skips, 0, key)
        self.folder = folder
        self.dtype = dtype
        self.num_skipped = 0
        self.total_skipped = 0

    def must_skip(
        self, report: StepReport, iteration: int, batch: List[Dict[str, Any]], model: nn.Module
    ) -> bool:
        """Whether the weights are not to be updated. All processes call it before the update.

        Raises:
            FloatingPointError: if a loss is not finite and may not be skipped; it names iteration,
                terms, images, and the file with the batch.
        """
        if not report.failed:
            self.num_skipped = 0
            return False
        self.num_skipped += 1
        self.total_skipped += 1
        path = None
        is_first = self.folder is not None and self.num_skipped == 1
        if comm.get_rank() in report.failed and is_first:
            path = self._dump(report, iteration, batch, model)
        found = {
            rank: where
            for rank, where in enumerate(comm.all_gather((path, _names(batch))))
            if rank in report.failed
        }
        message = self._sentence(report, iteration, found)
        if self.num_skipped > self.max_skips:
            raise FloatingPointError(message)
        logger.warning("%s Skipped (%d in a row).", message, self.num_skipped)
        return True

    def state_dict(self) -> Dict[str, int]:
        return {"num_skipped": self.num_skipped, "total_skipped": self.total_skipped}

    def load_state_dict(self, state: Dict[str, int]) -> None:
        self.num_skipped, self.total_skipped = state["num_skipped"], state["total_skipped"]

    def _dump(
        self, report: StepReport, iteration: int, batch: List[Dict[str, Any]], model: nn.Module
    ) -> str:
        path = os.path.join(self.folder, f"nonfinite_{iteration:07d}_rank{comm.get_rank()}.pth")
        content = {
            "iteration": iteration,
            "failed": report.failed[comm.get_rank()],
            "dtype": None if self.dtype is None else str(self.dtype),
            "batch": [_plain(inputs) for inputs in batch],
            "model": getattr(model, "module", model).state_dict(),
        }
        try:
            write_checkpoint(content, path)
        except OSError as error:
            return f"not written: {error}"
        return path

    def _sentence(self, report: StepReport, iteration: int, found: Dict[int, Any]) -> str:
        terms = sorted({name for names in report.failed.values() for name in names})
        images = [name for _, names in found.values() for name in names]
        text = (
            f"Loss {', '.join(terms)} is not finite at iteration {iteration}, in the batch of "
            f"{', '.join(images[:8]) or 'unnamed images'}{', ...' if len(images) > 8 else ''}."
        )
        paths = [path for path, _ in found.values() if path]
        if paths:
            text += f" tools/replay_batch.py {paths[0]} runs it again."
        if self.dtype == torch.float16:
            text += " In float16 large features overflow: try bfloat16 or float32."
        return text + " A learning rate that is too high, or wrong boxes, are the usual causes."


def _names(batch: Any) -> List[str]:
    """Images of a batch of Detectron2's dicts; none of another batch."""
    return [
        f"image {inputs.get('image_id', i)} ({inputs.get('file_name', 'no file')})"
        for i, inputs in enumerate(batch if isinstance(batch, list) else ())
    ]


def _plain(inputs: Dict[str, Any]) -> Dict[str, Any]:
    """An image of a batch as tensors and plain values, which files are read as."""
    plain = {
        key: value
        for key, value in inputs.items()
        if isinstance(value, (torch.Tensor, str, int, float))
    }
    instances = inputs.get("instances")
    if instances is not None:
        plain["image_size"] = [int(x) for x in instances.image_size]
        plain["gt_boxes"] = instances.gt_boxes.tensor
        plain["gt_classes"] = instances.gt_classes
        if instances.has("gt_masks"):
            masks = instances.gt_masks
            plain["gt_masks"] = (
                masks.tensor
                if hasattr(masks, "tensor")
                else [[torch.as_tensor(p) for p in polygons] for polygons in masks.polygons]
            )
    return plain


def load_batch(content: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The batch of a file that `NonFiniteGuard` wrote, as a model takes it.

    Args:
        content: of the file.
    """
    from detectron2.structures import BitMasks, PolygonMasks

    batch = []
    for plain in content["batch"]:
        inputs = dict(plain)
        if "gt_boxes" in inputs:
            instances = Instances(tuple(inputs.pop("image_size")))
            instances.gt_boxes = Boxes(inputs.pop("gt_boxes"))
            instances.gt_classes = inputs.pop("gt_classes")
            masks = inputs.pop("gt_masks", None)
            if masks is not None:
                instances.gt_masks = (
                    BitMasks(masks)
                    if isinstance(masks, torch.Tensor)
                    else PolygonMasks([[p.numpy() for p in polygons] for polygons in masks])
                )
            inputs["instances"] = instances
        batch.append(inputs)
    return batch
