#!/usr/bin/env python
"""Training runs that are killed at random moments, resumed, and compared with an undisturbed one.

A series is one run in a folder of its own: it is killed (SIGKILL) up to `--kills-per-series` times,
each time in a phase drawn at random, and starts again with --auto-resume until it is done. After
each kill the folder must resume exactly after its last checkpoint; the last one of a series must
equal, bit for bit, that of the run that nothing disturbed. Series add up in kill.json::

    python tools/stress/kill.py --output output/stress/kill --kills 200
"""

import argparse
import json
import random
import shutil
import signal
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from atss.checkpoint import read_checkpoint
from atss.checkpoint.finding import last_checkpoint
from stress._thin_runs import PHASES, command, curve, differences, live, make_data


def run_series(
    kind: str,
    folder: Path,
    reference: Path,
    data: Sequence[str],
    num_kills: int,
    rng: random.Random,
    overrides: Sequence[str] = (),
) -> Counter:
    """One run, killed again and again, until it is done.

    Args:
        kind: a key of `TOOLS`.
        folder: of the run, new.
        reference: folder of the run that nothing disturbed.
        data: of `make_data`.
        num_kills: after as many, the run is left alone.
        rng: draws phase and moment of each kill.
        overrides: see `command`.

    Returns:
        How many kills met each phase; "finished before" counts those that came too late.

    Raises:
        AssertionError: the run lost more than it may, did not resume, or ended otherwise.
    """
    arguments = command(kind, folder, data, "--auto-resume", overrides=overrides)
    counts: Counter = Counter()
    for _ in range(num_kills):
        phase = rng.choice(PHASES)
        start = rng.randint(1, {"data": 16, "checkpoint": 6, "evaluation": 2}.get(phase, 4))
        saved = _num_saved(folder)
        life = live(kind, arguments, (phase, start, rng.uniform(0, 0.03)))
        if life.code == 0:
            counts["finished before"] += 1
            break
        assert life.code == -signal.SIGKILL, f"{kind} in {folder}: {life.output}"
        counts[life.phase or "between"] += 1
        assert _num_saved(folder) >= saved, f"{folder}: a checkpoint was lost"
    life = live(kind, arguments)
    assert life.code == 0, f"{kind} in {folder} does not resume: {life.output}"
    ends = [read_checkpoint(str(f / "model_final.pth")) for f in (folder, reference)]
    unequal = list(differences(*ends))
    assert not unequal, f"{kind} in {folder}: {unequal[:5]} differ from the undisturbed run"
    found, expected = curve(folder), curve(reference)
    # YAML runs write every 20 iterations: what was evaluated just before a kill may be missing.
    is_same = found.items() <= expected.items() if kind == "yaml" else found == expected
    assert is_same, f"{kind} in {folder}: metrics.json has {found}, not {expected}"
    left = [path.name for path in folder.glob("*.part")]
    assert not left, f"{folder}: {left} were left"
    return counts


def _num_saved(folder: Path) -> int:
    """Iterations that the newest complete checkpoint has done."""
    try:
        return read_checkpoint(last_checkpoint(str(folder)))["iteration"] + 1
    except FileNotFoundError:
        return 0


VARIANTS = {
    "lazy": ("lazy", []),
    "lazy, asynchronous": ("lazy", ["train.checkpointer.asynchronous=True"]),
    "lazy, a loading process": ("lazy", ["dataloader.train.num_workers=1"]),
    "yaml": ("yaml", []),
    "plain": ("plain", []),
}


def main(args: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/stress/kill"))
    parser.add_argument("--kills", type=int, default=200, help="of all calls for this folder")
    parser.add_argument("--kills-per-series", type=int, default=5)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "kill.json"
    results = json.loads(file.read_text()) if file.exists() else {"series": 0, "phases": {}}
    data_folder = options.output / "data"
    data = make_data(data_folder)
    phases = Counter(results["phases"])
    while sum(phases.values()) - phases["finished before"] < options.kills:
        name, (kind, overrides) = list(VARIANTS.items())[results["series"] % len(VARIANTS)]
        reference = options.output / f"undisturbed_{kind}"
        if not (reference / "model_final.pth").exists():
            shutil.rmtree(reference, ignore_errors=True)
            life = live(kind, command(kind, reference, data))
            assert life.code == 0, life.output
        folder = options.output / "series"
        shutil.rmtree(folder, ignore_errors=True)
        rng = random.Random(results["series"])
        phases += run_series(
            kind, folder, reference, data, options.kills_per_series, rng, overrides
        )
        results.update(
            series=results["series"] + 1,
            phases=dict(phases),
            kills=sum(phases.values()) - phases["finished before"],
            date=str(date.today()),
            torch=torch.__version__,
        )
        file.write_text(json.dumps(results, indent=1))
        print(f"series {results['series']} ({name}): {results['kills']} kills", flush=True)
    print(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
