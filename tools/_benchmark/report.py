"""Measurements as rows, tables, a plot and blocks of a page."""

import math
import re
from dataclasses import asdict
from pathlib import Path
from statistics import mode
from typing import Any, Dict, List, Optional, Sequence, Tuple

from _markdown import markdown_table
from matplotlib.figure import Figure

from .cases import Case
from .timing import Timing

_PANELS = (("assign", "objects"), ("assign", "size"), ("loss", "classes"), ("loss", "size"))
_LABELS = {"size": "megapixels of the image", "objects": "objects of the image"}


def row(case: Case, timings: Dict[str, Timing]) -> Dict[str, Any]:
    """One case with its timings as plain values."""
    return {
        "part": case.part,
        "settings": case.settings,
        "unit_bytes": case.unit_bytes,
        "contestants": {name: asdict(timing) for name, timing in timings.items()},
    }


def tables(rows: Sequence[Dict[str, Any]]) -> Dict[str, str]:
    """A Markdown table for each part.

    Times are "minimum (median)"; ratios are of minima; memory is the peak beyond what was held
    before the call.
    """
    parts: Dict[str, List[Dict[str, Any]]] = {}
    for entry in rows:
        parts.setdefault(entry["part"], []).append(entry)
    return {
        part: "\n\n".join(map(_model_table, entries))
        if part in ("train", "inference", "steps")
        else _part_table(entries)
        for part, entries in parts.items()
    }


def _model_table(entry: Dict[str, Any]) -> str:
    """A line for each detector, with its speed relative to FCOS, RetinaNet or the first one."""
    timings, settings = entry["contestants"], entry["settings"]
    reference = next(name for name in ("FCOS", "RetinaNet", *timings) if name in timings)
    title = ", ".join(f"{key} {value}" for key, value in settings.items())
    header = ["detector", "ms", "images/s", f"speed / {reference}", "peak memory"]
    lines = []
    for name, timing in timings.items():
        share = timing["outside_convolution"]
        lines.append(
            [
                name,
                _time(timing),
                f"{1000 * settings['images'] / timing['min_ms']:.2f}",
                f"{timings[reference]['min_ms'] / timing['min_ms']:.2f}",
                _memory(timing["peak_bytes"]),
                "n/a" if share is None else f"{share:.0%}",
            ]
        )
    return f"{title}:\n\n{markdown_table([*header, 'outside convolution'], lines)}"


def _part_table(entries: Sequence[Dict[str, Any]]) -> str:
    """A line for each case; ratios say how many times longer others take than the first."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry["settings"]))
    names = list(dict.fromkeys(name for entry in entries for name in entry["contestants"]))
    header = [*keys, *(f"{name}, ms" for name in names)]
    header += [*(f"{name} / {names[0]}" for name in names[1:]), "peak memory"]
    lines = []
    for entry in entries:
        timings = entry["contestants"]
        ours = timings[names[0]]
        line = [entry["settings"].get(key, "") for key in keys]
        line += [_time(timings[name]) if name in timings else "n/a" for name in names]
        line += [
            f"{timings[name]['min_ms'] / ours['min_ms']:.2f}" if name in timings else "n/a"
            for name in names[1:]
        ]
        memory = [
            f"{name} {_memory(timing['peak_bytes'], entry['unit_bytes'])}"
            for name, timing in timings.items()
            if timing["peak_bytes"] is not None
        ]
        lines.append([*line, ", ".join(memory) or "n/a"])
    return markdown_table(header, lines)


def _time(timing: Dict[str, Any]) -> str:
    """Such as "1.23 (1.25)"."""
    return f"{_three_digits(timing['min_ms'])} ({_three_digits(timing['median_ms'])})"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _memory(peak: Optional[int], unit: int = 0) -> str:
    if peak is None:
        return "n/a"
    text = f"{peak / 2**20:.1f} MiB"
    # The unit of the loss is a tensor of the size of all logits.
    return f"{text} ({peak / unit:.2f} x logits)" if unit else text


def plot(path: Path, rows: Sequence[Dict[str, Any]]) -> None:
    """Time over objects, image size and classes, as a PNG; panels without data are left out."""
    series = [(part, key, _points(rows, part, key)) for part, key in _PANELS]
    series = [panel for panel in series if len(panel[2]) > 1]
    if not series:
        part = rows[0]["part"]
        series = [(part, "case", _points(rows, part, "case"))]
    figure = Figure((4.2 * len(series), 3.6), layout="constrained")
    axes = figure.subplots(1, len(series), squeeze=False)
    for axis, (part, key, points) in zip(axes[0], series):
        for name in dict.fromkeys(name for _, times in points for name in times):
            line = sorted((x, times[name]) for x, times in points if name in times)
            axis.plot(*zip(*line), marker="o", markersize=3, label=name)
        scale = "linear" if key == "size" else "log"
        label = _LABELS.get(key, key)
        axis.set(xscale=scale, yscale="log", xlabel=label, ylabel="ms (minimum)", title=part)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _points(
    rows: Sequence[Dict[str, Any]], part: str, key: str
) -> List[Tuple[float, Dict[str, float]]]:
    """(x, {name: ms}) of the rows of a part whose other settings have their usual values."""
    entries = [entry for entry in rows if entry["part"] == part]
    others = {*entries[0]["settings"]} - {key} if entries and key != "case" else set()
    usual = {name: mode(entry["settings"][name] for entry in entries) for name in others}
    points = []
    for number, entry in enumerate(entries, start=1):
        x = {**entry["settings"], "case": number}[key]
        if key == "size":
            x = math.prod(map(int, x.split("x"))) / 1e6
        if all(entry["settings"][name] == value for name, value in usual.items()):
            times = {name: timing["min_ms"] for name, timing in entry["contestants"].items()}
            points.append((x, times))
    return points


def blocks(rows: Sequence[Dict[str, Any]], facts: Dict[str, Any], command: str) -> Dict[str, str]:
    """Content for `update_page`: a table for each part, with how it was measured.

    Blocks are named after the part ("assign"), and on a GPU also after the device ("assign cuda").

    Args:
        rows: of `row`.
        facts: of `environment`.
        command: the one that measured them.
    """
    device = "" if facts["device"] == "cpu" else f" {facts['device']}"
    threads = f", {facts['threads']} thread{'s' * (facts['threads'] > 1)}" * (not device)
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "torchvision", "detectron2"))
    origin = f"`{command}`: {facts['machine']}{threads}; {versions}."
    return {f"{part}{device}": f"\n{origin}\n\n{table}\n" for part, table in tables(rows).items()}


def update_page(path: Path, blocks: Dict[str, str]) -> None:
    """Replace the measured blocks of a Markdown page.

    A block stands between `<!-- benchmark NAME -->` and `<!-- end -->`; blocks that were not
    measured stay as they are.

    Args:
        path: of the page.
        blocks: new content by name.

    Raises:
        ValueError: for a page without a block of one of the names.
    """
    text = path.read_text()
    for name, content in blocks.items():
        pattern = re.compile(rf"(<!-- benchmark {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(text):
            raise ValueError(
                f"{path} has no block '<!-- benchmark {name} -->' ... '<!-- end -->' to fill "
                "(--markdown)."
            )
        text = pattern.sub(lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text)
    path.write_text(text)
