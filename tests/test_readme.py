"""Pages: the four axes word for word; files, names and code that exist."""

import pkgutil
import re

import atss
import pytest
from conftest import REPO
from pages import PAGES

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
