"""Options of the benchmark, and its cases: contestants that do the same work."""

import argparse
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

from torch import Tensor

Size = Tuple[int, int]  # height, width
Levels = List[Tensor]  # head outputs of P3 to P7


# Of `benchmark.make_parser`, with a `torch.device`.
Options = argparse.Namespace


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

    def make_input(self) -> Any:
        return self.prepare() if self.prepare is not None else None


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


def scaled_size(size: Size, factor: float) -> Size:
    """A size times a factor, in multiples of 32 pixels."""
    height, width = (max(32, round(side * factor / 32) * 32) for side in size)
    return height, width
