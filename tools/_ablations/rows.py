"""Rows of the paper's tables: the `row` node of their configs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from atss.model_zoo import config_file
from omegaconf import DictConfig

from detectron2.config import LazyConfig

CONFIGS = Path(config_file("toy/atss_toy")).parents[1]


@dataclass(frozen=True)
class Row:
    """One line of a table; all but the name stands in the `row` node of its config.

    Attributes:
        name: of the config, below `configs`: "ablations/topk/k3".
        table: "Table 4", or "Release".
        number: its place in the table, from 1.
        title: how the table calls the row.
        ap: published AP, None where there is none.
        source: who published it: "paper", "release" or "mmdetection".
        split: on which images: "minival" or "test-dev".
        parent: name of the config it starts from.
        same_as: in place of a parent, name of the config it equals; for the first row of a chain
            the model in `configs/common`.
        changes: all its differences from the parent, as "key: old -> new", or as "key", which
            stands for everything below that key.
    """

    name: str
    table: str
    number: int
    title: str
    ap: Optional[float]
    source: Optional[str]
    split: Optional[str]
    parent: Optional[str] = None
    same_as: Optional[str] = None
    changes: Tuple[str, ...] = ()

    def __post_init__(self):
        if (self.parent is None) == (self.same_as is None):
            raise TypeError("it needs either a parent or same_as")

    @property
    def origin(self) -> str:
        """Name of the config that it is compared with."""
        return self.parent or self.same_as


def find_rows() -> List[Row]:
    """All rows, by table.

    Raises:
        ValueError: naming a file whose `row` is missing or incomplete.
    """
    files = [*(CONFIGS / "ablations").rglob("*.py"), *(CONFIGS / "coco").glob("atss_*.py")]
    return sorted((_read_row(path) for path in files), key=lambda row: (row.table, row.number))


def _read_row(path: Path) -> Row:
    content = LazyConfig.load(str(path)).get("row")
    if content is None:
        raise ValueError(f"{path} has no `row = dict(table=..., number=..., title=..., ...)`.")
    name = path.relative_to(CONFIGS).with_suffix("").as_posix()
    try:
        return Row(name, **{**content, "changes": tuple(content.get("changes", ()))})
    except TypeError as error:
        raise ValueError(f"The `row` of {path} cannot be read: {error}.") from None


def select_rows(rows: Sequence[Row], wanted: Sequence[str]) -> List[Row]:
    """Rows by name, file or folder: "topk/k3", "configs/ablations/topk/k3.py", "topk".

    Raises:
        ValueError: for one that does not exist, listing what there is.
    """
    selected: List[Row] = []
    for entry in wanted:
        key = entry[:-3] if entry.endswith(".py") else entry.rstrip("/")
        found = [r for r in rows if f"/configs/{r.name}".endswith(f"/{key}")]
        found = found or [r for r in rows if f"/{r.name.rpartition('/')[0]}".endswith(f"/{key}")]
        if not found:
            folders = sorted({row.name.rpartition("/")[0] for row in rows})
            raise ValueError(
                f"There is no row {entry!r}. Folders are {folders}, rows "
                f"{[row.name for row in rows]}."
            )
        selected += [row for row in found if row not in selected]
    return selected


def load(name: str) -> DictConfig:
    """Config of a name below `configs`, loaded anew, without its `row` node."""
    cfg = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    cfg.pop("row", None)
    return cfg


def measured_ap(cfg: DictConfig, root: Path) -> Optional[float]:
    """AP of the last evaluation in the run's `metrics.json`, None if there is none.

    Args:
        cfg: of the row.
        root: folder that relative output folders are in.
    """
    file = root / cfg.train.output_dir / "metrics.json"
    if not file.is_file():
        return None
    records = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    found = [record["bbox/AP"] for record in records if "bbox/AP" in record]
    return found[-1] if found else None
