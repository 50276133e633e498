"""What was measured, for people and for programs: tables, a plot, JSON, blocks of a page."""

import json
import os
import platform
import re
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
import torchvision
from benchmark_peers import has_fcos

import detectron2

__all__ = ["blocks", "environment", "plot", "row", "tables", "update_page", "write_json"]

_MIB = 2**20


def environment(device: torch.device) -> Dict[str, Any]:
    """Machine class and versions; no names of hosts or paths."""
    return {
        "device": device.type,
        "machine": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        # main still calls itself 0.6
        "detectron2": detectron2.__version__ + (", main" if has_fcos() else ""),
    }


def _processor() -> str:
    """Such as "2 cores, Intel(R) Xeon(R) Processor, avx512_bf16, amx_bf16"."""
    parts = [f"{os.cpu_count()} cores"]
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ", ".join([*parts, platform.machine()])
    names = re.findall(r"model name\s*:\s*(.+)", text)
    parts.append(names[0] if names else platform.machine())
    flags = set(" ".join(re.findall(r"flags\s*:\s*(.+)", text)[:1]).split())
    return ", ".join(
        parts + [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    )


def row(case: Any, timings: Dict[str, Any]) -> Dict[str, Any]:
    """One case with its timings as plain values, times in milliseconds."""
    return {
        "part": case.part,
        "settings": case.settings,
        "unit_bytes": case.unit_bytes,
        "contestants": {
            name: {
                "min_ms": timing.minimum * 1e3,
                "median_ms": timing.median * 1e3,
                "peak_bytes": timing.peak_bytes,
                "rounds": timing.rounds,
                "outside_convolution": timing.outside_convolution,
            }
            for name, timing in timings.items()
        },
    }


def tables(rows: Sequence[Dict[str, Any]]) -> Dict[str, str]:
    """A Markdown table for each part.

    A cell is "minimum (median) ms"; ratios say how many times longer a peer takes than the first
    contestant, by minima; memory is the peak beyond what was there before the call.
    """
    parts: Dict[str, List[Dict[str, Any]]] = {}
    for entry in rows:
        parts.setdefault(entry["part"], []).append(entry)
    return {
        part: (_model_table if part in ("train", "inference", "steps") else _table)(entries)
        for part, entries in parts.items()
    }


def _model_table(entries: Sequence[Dict[str, Any]]) -> str:
    """Whole models: a line for each contestant, speed beside that of FCOS (else RetinaNet)."""
    lines = []
    for entry in entries:
        timings, settings = entry["contestants"], entry["settings"]
        peer = next(name for name in ("FCOS", "RetinaNet", *timings) if name in timings)
        if lines:
            lines.append("")
        lines.append(", ".join(f"{key} {value}" for key, value in settings.items()) + ":")
        header = ["detector", "ms", "images/s", f"speed / {peer}", "peak memory"]
        header.append("outside convolution")
        lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for name, timing in timings.items():
            share = timing["outside_convolution"]
            cells = [
                name,
                f"{_ms(timing['min_ms'])} ({_ms(timing['median_ms'])})",
                f"{1000 * settings['images'] / timing['min_ms']:.2f}",
                f"{timings[peer]['min_ms'] / timing['min_ms']:.2f}",
                "n/a" if timing["peak_bytes"] is None else _memory(timing["peak_bytes"], 0),
                "n/a" if share is None else f"{share:.0%}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _table(entries: Sequence[Dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for entry in entries for key in entry["settings"]))
    names = list(dict.fromkeys(name for entry in entries for name in entry["contestants"]))
    has_memory = any(
        timing["peak_bytes"] is not None
        for entry in entries
        for timing in entry["contestants"].values()
    )
    header = [*keys, *(f"{name}, ms" for name in names)]
    header += [f"{name} / {names[0]}" for name in names[1:]]
    header += ["peak memory"] if has_memory else []
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for entry in entries:
        timings = entry["contestants"]
        cells = [str(entry["settings"].get(key, "")) for key in keys]
        for name in names:
            timing = timings.get(name)
            cells.append(
                f"{_ms(timing['min_ms'])} ({_ms(timing['median_ms'])})" if timing else "n/a"
            )
        ours = timings.get(names[0])
        for name in names[1:]:
            both = ours and name in timings
            cells.append(f"{timings[name]['min_ms'] / ours['min_ms']:.2f}" if both else "n/a")
        if has_memory:
            cells.append(
                ", ".join(
                    f"{name} {_memory(timing['peak_bytes'], entry['unit_bytes'])}"
                    for name, timing in timings.items()
                    if timing["peak_bytes"] is not None
                )
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _memory(peak: int, unit: int) -> str:
    text = f"{peak / _MIB:.1f} MiB"
    # The loss is counted in tensors of the size of all logits, what it makes of them.
    return f"{text} ({peak / unit:.2f} x logits)" if unit else text


def write_json(path: Path, result: Dict[str, Any]) -> None:
    """Everything that was measured, with machine, versions and arguments."""
    path.write_text(json.dumps(result, indent=1))


def plot(path: Path, rows: Sequence[Dict[str, Any]]) -> None:
    """How time grows: with objects, image size and classes. Panels without data are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("assign", "objects", {"images": 1, "A": 1, "size": _main_size(rows, "assign")}),
        ("assign", "pixels", {"images": 1, "A": 1, "objects": 20}),
        ("loss", "classes", {"images": _least(rows, "loss"), "size": _main_size(rows, "loss")}),
        ("loss", "pixels", {"images": _least(rows, "loss"), "classes": 80}),
    ]
    panels = [panel for panel in panels if len(_series(rows, *panel)[0]) > 1]
    if not panels:
        panels = [(entry["part"], "case", {}) for entry in rows[:1]]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (part, key, fixed) in zip(axes[0], panels):
        values, names = _series(rows, part, key, fixed)
        for name in names:
            points = sorted((x, times[name]) for x, times in values if name in times)
            axis.plot(*zip(*points), marker="o", markersize=3, label=name)
        scale = "linear" if key == "pixels" else "log"
        label = {"pixels": "megapixels of the image", "objects": "objects of the image"}.get(
            key, key
        )
        axis.set(xscale=scale, yscale="log", xlabel=label, ylabel="ms (minimum)", title=part)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _series(rows, part: str, key: str, fixed: Dict[str, Any]):
    """[(x, {name: ms})] of the rows of a part that have the fixed settings, and the names."""
    values, names = [], {}
    for index, entry in enumerate(e for e in rows if e["part"] == part):
        settings = entry["settings"]
        if any(settings.get(name) != value for name, value in fixed.items()):
            continue
        if key == "pixels":
            height, width = settings["size"].split("x")
            x = int(height) * int(width) / 1e6
        else:
            x = settings.get(key, index + 1)
        if isinstance(x, str):
            continue
        times = {name: timing["min_ms"] for name, timing in entry["contestants"].items()}
        names.update(dict.fromkeys(times))
        values.append((x, times))
    return values, list(names)


def _main_size(rows, part: str) -> Any:
    """The size that most rows of a part have."""
    sizes = [entry["settings"]["size"] for entry in rows if entry["part"] == part]
    return max(sizes, key=sizes.count) if sizes else None


def _least(rows, part: str) -> Any:
    images = [entry["settings"]["images"] for entry in rows if entry["part"] == part]
    return min(images) if images else None


def blocks(rows: Sequence[Dict[str, Any]], facts: Dict[str, Any], command: str) -> Dict[str, str]:
    """What `update_page` fills in: a table for each part, with how it was measured.

    Blocks are named after the part on the CPU ("assign"), after part and device else
    ("assign cuda").

    Args:
        rows: of `row`.
        facts: of `environment`.
        command: that measured them.
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
