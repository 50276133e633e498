"""The floors of the package: who may import whom, and how modules present themselves."""

import ast
from pathlib import Path

import atss
import pytest

PACKAGE = Path(atss.__file__).parent
REPO = PACKAGE.parents[2]
# A file imports from rows above its own, or from its own folder.
ROWS = (
    ("checks", "config", "device", "geometry", "stored_settings"),
    ("anchor_grid", "box_regression", "layers"),
    ("anchors", "predictions"),
    ("losses.background", "losses.boxes", "losses.classification"),
    ("assigners", "backbone", "checkpoint", "data", "head"),
    ("targets",),
    ("losses", "postprocessing"),
    ("build", "model_zoo"),
    ("proposal_generator",),
    ("detector",),
    ("evaluation", "inference_mode", "tta", "visualization"),
    ("export", "predictor", "training"),
    ("trainer",),
    ("__main__", "commands", "report"),
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def row_of(module):
    """Row of the longest name in `ROWS` that the module is, or lies in."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for i, row in enumerate(ROWS):
            if ".".join(parts[:length]) in row:
                return i
    raise AssertionError(f"{module} has no row: give it one in ROWS")


def imports_of(path):
    """Modules of the package that a file imports, wherever in the file, also for type hints."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield ".".join((*base, *name.split(".")))
        elif isinstance(node, ast.ImportFrom):
            assert not node.module.startswith("atss"), f"{path}: import relatively"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_module_imports_from_rows_above_or_its_own_folder(path):
    module = dotted(path)
    folder = module.rpartition(".")[0]
    for imported in imports_of(path):
        is_own = folder and (imported == folder or imported.startswith(f"{folder}."))
        assert is_own or row_of(imported) < row_of(module), f"{module} imports {imported}"


def test_an_import_against_the_rows_is_seen(tmp_path, monkeypatch):
    (tmp_path / "anchors.py").write_text("def f():\n    from .detector import ATSSDetector\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    with pytest.raises(AssertionError, match="anchors imports detector"):
        test_module_imports_from_rows_above_or_its_own_folder(tmp_path / "anchors.py")


@pytest.mark.parametrize(
    "path",
    [*PACKAGE.rglob("*.py"), *(REPO / "tools").rglob("*.py")],
    ids=lambda path: str(path.relative_to(REPO)),
)
def test_module_says_what_it_holds(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not tree.body:
        return
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    assert first and not first.endswith("?"), f"{path}: {first!r} is not a name of what it holds"
    if path.name != "__init__.py":
        names = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets
                 if isinstance(t, ast.Name)]  # fmt: skip
        assert "__all__" not in names, f"{path}: __all__ belongs into __init__.py"


def test_the_package_is_a_short_list():
    entries = [entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= 30 and "utils.py" not in entries, sorted(entries)
