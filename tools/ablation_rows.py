"""Which rows are there, and in what does each differ from its parent?

A row is a config below `configs/ablations`, or one of the release's models in `configs/coco`. Its
file says everything once: which file it imports from, what it assigns, and in the docstring the
table, the row and the published AP. This module reads that off.
"""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from atss.model_zoo import config_file
from omegaconf import DictConfig

from detectron2.config import LazyConfig

__all__ = ["CONFIGS", "Row", "find_rows", "load_parent", "load_row", "measured_ap", "select_rows"]

CONFIGS = Path(config_file("toy/atss_toy")).parents[1]

_AP = re.compile(r"(The paper|The release|mmdetection)'s AP on (minival|test-dev): (\d+\.\d)\.")
_ABLATION = re.compile(r"Table (\d), row (\d+): (.+?)\. The paper's AP")
_RELEASE = re.compile(r"ATSS, (.+?) \((?:[^;()]+; )?the authors' (\w+)\)\.")
_CLAIM = re.compile(r"(Parent: |Same as )(\S+\.py)\.")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: as `model_zoo.get_config` takes it, "ablations/topk/k3".
        table: "Table 4", or "Release".
        number: its place in the table.
        title: how the table calls the row.
        ap: published AP, None where there is none.
        source: who published it: "paper", "release" or "mmdetection".
        split: on which images: "minival" or "test-dev".
        parent: name of the config it starts from, None if it starts from `configs/common` alone.
        model: for those, the file of the model in `configs/common`.
        is_same_as: it declares to be its parent under another name.
        claimed: the parent as the docstring has it, a file relative to this one's folder.
        assigned: the entries that it sets, such as "model.assigner.topk".
    """

    name: str
    table: str
    number: Tuple[int, ...]
    title: str
    ap: Optional[float]
    source: Optional[str]
    split: Optional[str]
    parent: Optional[str]
    model: Optional[str]
    is_same_as: bool
    claimed: Optional[str]
    assigned: Tuple[str, ...]

    @property
    def path(self) -> Path:
        """File of the config."""
        return CONFIGS / f"{self.name}.py"


def find_rows() -> List[Row]:
    """All rows, by table.

    Raises:
        ValueError: naming a file whose docstring or statements cannot be understood.
    """
    files = [*(CONFIGS / "ablations").rglob("*.py"), *(CONFIGS / "coco").glob("atss_*.py")]
    return sorted((_read_row(path) for path in files), key=lambda row: (row.table, row.number))


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


def load_row(row: Row) -> DictConfig:
    """The row's config, loaded anew."""
    return LazyConfig.load(str(row.path))


def load_parent(row: Row) -> DictConfig:
    """The config that a row starts from, for rows that have one."""
    return LazyConfig.load(str(CONFIGS / f"{row.parent}.py"))


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


def _read_row(path: Path) -> Row:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = " ".join((ast.get_docstring(tree) or "").split())
    ablation, release = _ABLATION.match(text), _RELEASE.match(text)
    if not (ablation or release):
        raise ValueError(
            f"The docstring of {path} does not start with its row, such as 'Table 4, row 1: k = "
            f"3. The paper's AP on minival: 38.0. Parent: k9.py.', but with {text[:60]!r}."
        )
    ap, claim = _AP.search(text), _CLAIM.search(text)
    parent, model, assigned = _read_statements(path, tree)
    return Row(
        name=_config_name(path),
        table=f"Table {ablation[1]}" if ablation else "Release",
        number=(int(ablation[2]),) if ablation else _release_number(path),
        title=ablation[3] if ablation else release[1],
        ap=float(ap[3]) if ap else None,
        source=ap[1].replace("The ", "") if ap else None,
        split=ap[2] if ap else None,
        parent=parent,
        model=model,
        is_same_as=bool(claim) and claim[1].startswith("Same"),
        claimed=claim[2] if claim else None,
        assigned=tuple(assigned),
    )


def _read_statements(path: Path, tree: ast.Module):
    """Name of the parent, file of the model in common/, and assigned entries, of a config."""
    parent, model, imported, assigned = None, None, [], []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            file = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [alias.asname or alias.name for alias in node.names]
            if CONFIGS / "common" in file.parents:
                imported += [name for name in names if not name.startswith("_")]
                model = f"common/models/{file.name}.py" if "model" in names else model
            elif parent is None:
                parent = _config_name(file.with_suffix(".py"))
            else:
                raise ValueError(f"{path} imports from two parents, {parent} and {file}.")
        elif isinstance(node, (ast.Assign, ast.Delete)):
            assigned += [_dotted(path, target) for target in node.targets]
        elif not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)):
            raise ValueError(
                f"{path}, line {node.lineno}: a row only imports and assigns, so that its "
                "difference from its parent can be read off."
            )
    # What a child takes from common/ instead of its parent, it sets.
    return parent, model, (imported if parent else []) + assigned


def _dotted(path: Path, node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(path, node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return f"{_dotted(path, node.value)}.{node.slice.value}"
    raise ValueError(f"{path}, line {node.lineno}: cannot tell which entry is assigned.")


def _release_number(path: Path) -> Tuple[int, ...]:
    """Plain models before deformable ones, then by depth, groups and schedule."""
    numbers = [int(n) for n in re.findall(r"\d+", path.stem.replace("dcnv2", ""))]
    return ("dcnv2" in path.stem, *numbers)


def _config_name(path: Path) -> str:
    return path.resolve().relative_to(CONFIGS).with_suffix("").as_posix()
