"""Markdown tables that read as text too."""

from typing import Any, Sequence


def markdown_table(header: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    """A table with columns of equal width."""
    cells = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in cells
    )
