"""What is measured, and for how large a problem?"""

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import torch
from benchmark_timing import Contestant

__all__ = ["Case", "Scope"]


@dataclass
class Case:
    """One row of a table: the same work for all contestants.

    Attributes:
        part: name of the table.
        settings: what the row is about, by name.
        contestants: ours first, then peers.
        unit_bytes: size of what memory is counted in, if not in bytes.
    """

    part: str
    settings: Dict[str, Any]
    contestants: List[Contestant]
    unit_bytes: int = 0


@dataclass
class Scope:
    """What to measure.

    Attributes:
        device: where.
        image_size: (height, width) of the padded image.
        objects: numbers of objects of an image, for the growth of assignment.
        batch_sizes: of loss and post-processing.
        num_classes: K.
        class_sweep: numbers of classes, for the growth of the loss.
        size_factors: of the image's sides, for growth with the image.
        model: name of the config of whole models.
        model_batch_sizes: of whole models.
        compile: also measure whole models through `torch.compile`.
    """

    device: torch.device
    image_size: Tuple[int, int] = (800, 1344)
    objects: Sequence[int] = (1, 7, 20, 50, 100, 300, 1000)
    batch_sizes: Sequence[int] = (2, 8)
    num_classes: int = 80
    class_sweep: Sequence[int] = (1, 20, 365)
    size_factors: Sequence[float] = (0.5, 1.5)
    model: str = "coco/atss_R_50_FPN_1x"
    model_batch_sizes: Sequence[int] = (1,)
    compile: bool = False

    def scaled_size(self, factor: float) -> Tuple[int, int]:
        """The image size times a factor, in whole strides of the coarsest level but two."""
        height, width = (max(32, round(side * factor / 32) * 32) for side in self.image_size)
        return height, width
