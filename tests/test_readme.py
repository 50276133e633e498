"""Pages: the four axes word for word; files, names and code that exist."""

import pkgutil
import re

import atss
import cv2
import numpy as np
import pytest
from atss import model_zoo
from atss.checkpoint import ATSSCheckpointer
from conftest import REPO

PAGES = [REPO / "README.md", REPO / "MODEL_ZOO.md", *sorted((REPO / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
PACKAGE = REPO / "projects/ATSS/atss"
FOLDERS = (PACKAGE, PACKAGE.parent, REPO / "configs", REPO / "configs/ablations", REPO / "tools")


def axes(text):
    """The four lines as lists of words, without the marks of Markdown links and tables."""
    text = re.sub(r"\]\([^)]*\)|\[", "", text).replace("|", " ")
    return [line.split() for line in re.findall(r"Axis \d of 4:.*", text)]


def files_of(text):
    """Paths and names of configs that a page mentions, in backquotes or in commands."""
    yield from re.findall(r"(?<![\w/.])(?:configs|docs|projects|tests|tools)/[\w./]*\w", text)
    for name in re.findall(r"`(\w[\w.-]*(?:/[\w.-]+)*/?)`", text):
        is_below = "/" in name and any((f / name.split("/")[0]).is_dir() for f in FOLDERS)
        if is_below or name.endswith((".md", ".py", ".yaml")):
            yield name


def test_the_four_axes_are_the_same_lines_in_package_readme_and_config():
    config = (REPO / "configs/common/models/atss.py").read_text(encoding="utf-8")
    assert axes(README) == axes(atss.__doc__) == axes(config)
    assert len(axes(README)) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    for name in {*links, *files_of(text)}:
        if name.rpartition("/")[2].startswith("my_"):
            continue  # written by the reader of docs/extend.md
        if name == "config.yaml":
            continue  # written by every run
        places = [folder / name for folder in (page.parent, REPO, *FOLDERS)]
        assert any(p.exists() or p.with_name(f"{p.name}.py").exists() for p in places), name
    for name in re.findall(r"(?<![\w./])atss(?:\.\w+)+", text):
        pkgutil.resolve_name(name)


def test_detect_as_the_readme_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output/demo").mkdir(parents=True)
    ATSSCheckpointer(model_zoo.get("toy/atss_toy"), "output/demo").save("model_final")
    cv2.imwrite("image.jpg", np.zeros((90, 120, 3), np.uint8))
    exec(README.partition("```python\n")[2].partition("```")[0], {})
    assert "Boxes" in capsys.readouterr().out
