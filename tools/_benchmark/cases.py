"""Options of the benchmark, and its cases: contestants that do the same work."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

Size = Tuple[int, int]  # height, width
Levels = List[Tensor]  # head outputs of P3 to P7


@dataclass
class Options:
    """Sizes of the problems to measure.

    Attributes:
        device: where.
        image_size: (height, width) of the padded image.
        objects: numbers of objects of an image, for the growth of assignment.
        batch_sizes: of loss and post-processing.
        num_classes: K.
        other_num_classes: numbers of classes, for the growth of the loss.
        size_factors: of the image's sides, for growth with the image.
        model: name of the config of whole models.
        model_batch_sizes: of whole models.
        compile: also measure whole models through `torch.compile`.
    """

    device: torch.device
    image_size: Size = (800, 1344)
    objects: Sequence[int] = (1, 7, 20, 50, 100, 300, 1000)
    batch_sizes: Sequence[int] = (2, 8)
    num_classes: int = 80
    other_num_classes: Sequence[int] = (1, 20, 365)
    size_factors: Sequence[float] = (0.5, 1.5)
    model: str = "coco/atss_R_50_FPN_1x"
    model_batch_sizes: Sequence[int] = (1,)
    compile: bool = False

    def scaled_size(self, factor: float) -> Size:
        """The image size times a factor, in multiples of 32 pixels."""
        height, width = (max(32, round(side * factor / 32) * 32) for side in self.image_size)
        return height, width


@dataclass
class Contestant:
    """One way to do a piece of work.

    Attributes:
        name: column of the table.
        call: the work; gets what `prepare` returned.
        prepare: makes the input of one call, outside the clock; needed where `call` changes it.
    """

    name: str
    call: Callable[[Any], Any]
    prepare: Optional[Callable[[], Any]] = None


@dataclass
class Case:
    """One row of a table: the same work for all contestants.

    Attributes:
        part: name of the table.
        settings: what distinguishes the row, by name.
        contestants: ours first, then Detectron2's.
        unit_bytes: size of the unit that memory is counted in; 0 for bytes.
    """

    part: str
    settings: Dict[str, Any]
    contestants: List[Contestant]
    unit_bytes: int = 0


def size_text(size: Size) -> str:
    """Such as "800x1344"."""
    return "x".join(map(str, size))
