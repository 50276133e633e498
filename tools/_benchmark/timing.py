"""How long does a piece of work take beside its peers, and how much memory does it need?

Peers are timed in turn in one process (A B C, C B A, ...), so that a busy machine slows all of them
alike. The minimum is the figure to compare: it is what the code needs when nobody disturbs it.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch

__all__ = ["Contestant", "Timing", "peak_extra_bytes", "race"]

# A call shorter than this is repeated inside one measurement: the clock and the caches of the
# contestant before would show otherwise.
_LEAST_SECONDS = 0.004
_MOST_CALLS = 200


@dataclass
class Contestant:
    """One way to do a piece of work.

    Attributes:
        name: column of the table.
        call: the work; gets what `prepare` returned.
        prepare: makes the input of one call, outside the clock; needed where `call` changes it.
    """

    name: str
    call: Callable[[Any], Any]
    prepare: Optional[Callable[[], Any]] = None


@dataclass
class Timing:
    """What was measured.

    Attributes:
        minimum, median: seconds a call.
        peak_bytes: at the peak of a call beyond those before it.
        rounds: measurements.
        outside_convolution: share of the time, in [0, 1]; of whole models.
    """

    minimum: float
    median: float
    peak_bytes: Optional[int]
    rounds: int
    outside_convolution: Optional[float] = None


def race(
    contestants: Sequence[Contestant],
    device: torch.device,
    repeats: int = 15,
    warmup: int = 2,
    memory: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Dict[str, Timing]:
    """Time contestants in turn.

    Args:
        contestants: with different names.
        device: what to wait for at the end of a call.
        repeats: measurements of each.
        warmup: calls of each before that; at least one.
        memory: also measure the peak of allocations, in one more call.
        clock: `time.process_time` counts this process only, for a busy machine; with one thread on
            the CPU.

    Returns:
        `Timing` by name, in the given order.
    """
    calls: Dict[str, int] = {}
    for contestant in contestants:
        for _ in range(max(warmup, 1)):
            seconds = _time(contestant, 1, device, clock)
        # An input of its own for each call means one call a measurement.
        fits = int(_LEAST_SECONDS / max(seconds, 1e-9)) if contestant.prepare is None else 1
        calls[contestant.name] = max(1, min(fits, _MOST_CALLS))
    seconds_of: Dict[str, List[float]] = {contestant.name: [] for contestant in contestants}
    for i in range(repeats):
        for contestant in contestants if i % 2 == 0 else reversed(contestants):
            seconds = _time(contestant, calls[contestant.name], device, clock)
            seconds_of[contestant.name].append(seconds)
    return {
        contestant.name: Timing(
            min(seconds_of[contestant.name]),
            statistics.median(seconds_of[contestant.name]),
            peak_extra_bytes(contestant, device) if memory else None,
            repeats,
        )
        for contestant in contestants
    }


def _time(
    contestant: Contestant, calls: int, device: torch.device, clock: Callable[[], float]
) -> float:
    value = contestant.prepare() if contestant.prepare is not None else None
    _synchronize(device)
    start = clock()
    for _ in range(calls):
        contestant.call(value)
    _synchronize(device)
    return (clock() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_bytes(contestant: Contestant, device: torch.device) -> int:
    """Bytes that one call holds at its peak beyond those that were there before.

    On a GPU the caching allocator tells. On the CPU torch's allocator reports every allocation and
    release to the profiler, temporaries inside an operator included; the resident size of the
    process would show what the C library keeps for later instead.

    Args:
        contestant: what to call once.
        device: where its tensors live.
    """
    value = contestant.prepare() if contestant.prepare is not None else None
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        contestant.call(value)
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        contestant.call(value)
    events = profile.profiler.kineto_results.events()
    changes = [(_start(event), event.nbytes()) for event in events if event.name() == "[memory]"]
    current = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        current += change
        peak = max(peak, current)
    return peak


def _start(event: Any) -> int:
    # torch < 2.4 counts in microseconds.
    return event.start_ns() if hasattr(event, "start_ns") else event.start_us()
