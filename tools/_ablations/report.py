"""Tables, a picture and a Markdown report of trained rows, next to the paper's figures."""

import textwrap
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch
from _environment import environment
from _markdown import markdown_table
from matplotlib.figure import Figure

from .rows import Row

Results = Mapping[str, Sequence[Dict[str, Any]]]
_METRICS = ("AP50", "AP75", "APs", "APm", "APl")
READING = "## Reading"
# Rows of the paper that differ by no more count as equal: it has a single run of each.
EQUAL_AP = 0.2
CLOSE = f"within {EQUAL_AP} in the paper"


def results_table(rows: Sequence[Row], results: Results) -> str:
    """AP of each row: mean and range over the seeds; means of the other metrics."""
    lines = []
    for row in rows:
        aps = _aps(results, row)
        others = [mean(run["bbox"][name] for run in results[row.name]) for name in _METRICS]
        lines.append(
            [
                row.table,
                row.title,
                "" if row.ap is None else f"{row.ap:.1f}",
                f"{mean(aps):.1f}",
                f"{min(aps):.1f} to {max(aps):.1f}",
                *(f"{value:.1f}" for value in others),
            ]
        )
    seeds = len(results[rows[0].name])
    spread = f"{seeds} seeds" if seeds > 1 else "1 seed"
    header = ["table", "row", "AP in the paper (COCO)", "AP here", spread, *_METRICS]
    return markdown_table(header, lines)


def orderings(rows: Sequence[Row], results: Results) -> List[Tuple[str, str, str, str]]:
    """Differences in AP of every two rows of a table: in the paper, here, and the verdict.

    An ordering "holds" if every seed agrees with the paper, "is reversed" if every seed says the
    opposite, else it is "not clear". Rows that the paper has as equal have no ordering.

    Returns:
        (pair, difference in the paper, difference here by seed, verdict).
    """
    found = []
    for a, b in combinations(rows, 2):
        if a.table != b.table or a.ap is None or b.ap is None:
            continue
        expected = b.ap - a.ap
        # As printed: a difference that reads +0.0 has no sign.
        differences = [round(y - x, 1) for x, y in zip(_aps(results, a), _aps(results, b))]
        signs = {(difference > 0) - (difference < 0) for difference in differences}
        sign = 1 if expected > 0 else -1
        if abs(expected) <= EQUAL_AP + 1e-6:
            verdict = CLOSE
        elif signs == {sign}:
            verdict = "holds"
        else:
            verdict = "is reversed" if signs == {-sign} else "not clear"
        here = ", ".join(f"{difference:+.1f}" for difference in differences)
        found.append((f"{a.table}: {a.title} -> {b.title}", f"{expected:+.1f}", here, verdict))
    return found


def orderings_table(found: Sequence[Tuple[str, str, str, str]]) -> str:
    """What `orderings` returned, as a table."""
    return markdown_table(
        ["rows of a table, second minus first", "the paper", "here, by seed", "verdict"], found
    )


def plot(rows: Sequence[Row], results: Results, path: Path) -> None:
    """Bars of mean AP by table, a dot for each seed, as a PNG."""
    tables = list(dict.fromkeys(row.table for row in rows))
    counts = [sum(row.table == table for row in rows) for table in tables]
    figure = Figure((8, 0.8 * len(tables) + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots(
        len(tables), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": counts}
    )
    for axis, table in zip(axes[:, 0], tables):
        of_table = [row for row in rows if row.table == table]
        for y, row in enumerate(of_table):
            aps = _aps(results, row)
            axis.barh(y, mean(aps), color="#4c78a8", height=0.7)
            axis.plot(aps, [y] * len(aps), "o", color="black", markersize=4)
            axis.text(0.2, y, f"{mean(aps):.1f}", va="center", color="white")
        axis.set_yticks(range(len(of_table)), [row.title for row in of_table])
        axis.invert_yaxis()
        axis.set_title(table, loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[-1, 0].set_xlabel("AP (%) on the embedded shapes, val split; dots are seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def write_report(rows: Sequence[Row], results: Results, file: Path, command: str) -> None:
    """Write a Markdown report with a picture; an existing text below "## Reading" is kept.

    Args:
        rows: in the order of the tables.
        results: of `run_rows`.
        file: the report; the picture is written next to it.
        command: what to run to make it again.
    """
    picture = file.with_suffix(".png")
    plot(rows, results, picture)
    runs = list({(r["config"], r["seed"]): r for rs in results.values() for r in rs}.values())
    wall, cpu = sum(r["seconds"] for r in runs), mean(r["cpu_seconds"] for r in runs)
    seeds = sorted({r["seed"] for r in runs})
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    machine = f"{facts['machine']}; PyTorch {facts['torch']}, Detectron2 {facts['detectron2']}"
    verdicts = orderings(rows, results)
    words = {
        "holds": "hold with every seed",
        "is reversed": "are reversed with every seed",
        "not clear": "are not clear (seeds disagree)",
        CLOSE: f"are within {EQUAL_AP} AP in the paper",
    }
    found = Counter(verdict for *_, verdict in verdicts)
    counts = [f"{found[verdict]} {text}" for verdict, text in words.items()]
    what = (
        "Rows of the paper's tables, trained from scratch on the embedded shapes under equal "
        "conditions: the row's assigner, box transform, head, loss and anchors on the data, "
        "backbone and schedule of `configs/toy/atss_toy.py`, made smaller. "
        f"{runs[0]['iterations']} iterations of {runs[0]['batch']} images; AP on the 150 val "
        "images. The paper's figures are COCO AP of large models after 90,000 iterations or more: "
        "only orderings can be compared, not values. Rows of different tables that are the same "
        "model share their runs."
    )
    pairs = (
        f"Every two rows of a table, second minus first. Of {len(verdicts)} pairs, "
        f"{', '.join(counts)}."
    )
    how = (
        f"{len(runs)} runs with the seeds {', '.join(str(seed) for seed in seeds)}: {cpu:.0f} s of "
        f"CPU time each on average, {wall / 60:.0f} minutes of wall time summed over the runs, "
        f"{runs[0].get('threads', 1)} thread(s) a run. Machine: {machine}."
    )
    reading = "Not written yet.\n"  # by a person, about the figures
    if file.is_file() and READING in file.read_text():
        reading = file.read_text().split(READING, 1)[1].lstrip("\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"""# The paper's ablations in small

{_fill(what)}

![AP of each row]({picture.name})

{results_table(rows, results)}

## Orderings

{_fill(pairs)}

{orderings_table(verdicts)}

## How it was made

```bash
{command}
```

{_fill(how)}

{READING}

{reading}"""
    )


def _aps(results: Results, row: Row) -> List[float]:
    return [run["bbox"]["AP"] for run in results[row.name]]


def _fill(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)
