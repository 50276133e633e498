"""Time and memory of contestants that do the same work.

They are timed in turn in one process (A B C, C B A, ...), so that a busy machine slows all of them
alike. The minimum is the figure to compare: it is the least disturbed by other processes.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch

from .cases import Contestant

# Shorter calls are repeated within one measurement, so that neither the clock's resolution nor the
# caches that the previous contestant left matter.
_LEAST_SECONDS = 0.004
_MOST_CALLS = 200


@dataclass
class Timing:
    """What was measured.

    Attributes:
        min_ms, median_ms: milliseconds a call.
        peak_bytes: see `peak_extra_bytes`; None if not measured.
        rounds: measurements.
        outside_convolution: see `share_outside_convolution`; None if not measured.
    """

    min_ms: float
    median_ms: float
    peak_bytes: Optional[int]
    rounds: int
    outside_convolution: Optional[float]


def race(
    contestants: Sequence[Contestant],
    device: torch.device,
    repeats: int = 15,
    warmup: int = 2,
    memory: bool = True,
    shares: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Dict[str, Timing]:
    """Time contestants in turn.

    Args:
        contestants: with different names.
        device: what to wait for at the end of a call.
        repeats: measurements of each.
        warmup: calls of each before that; at least one.
        memory: also measure the peak of allocations, in one more call.
        shares: also measure the time outside convolution, in one more call.
        clock: seconds; `time.process_time` counts this process only, for a busy machine, and is
            right with one thread on the CPU.

    Returns:
        `Timing` by name, in the given order.
    """
    calls: Dict[str, int] = {}
    for contestant in contestants:
        for _ in range(max(warmup, 1)):
            seconds = _time(contestant, 1, device, clock)
        # Where each call needs a new input, a measurement is a single call.
        fits = int(_LEAST_SECONDS / max(seconds, 1e-9)) if contestant.prepare is None else 1
        calls[contestant.name] = max(1, min(fits, _MOST_CALLS))
    seconds_of: Dict[str, List[float]] = {contestant.name: [] for contestant in contestants}
    for i in range(repeats):
        for contestant in contestants if i % 2 == 0 else reversed(contestants):
            seconds = _time(contestant, calls[contestant.name], device, clock)
            seconds_of[contestant.name].append(seconds)
    return {
        contestant.name: Timing(
            min(seconds_of[contestant.name]) * 1e3,
            statistics.median(seconds_of[contestant.name]) * 1e3,
            peak_extra_bytes(contestant, device) if memory else None,
            repeats,
            share_outside_convolution(contestant, device) if shares else None,
        )
        for contestant in contestants
    }


def _time(
    contestant: Contestant, calls: int, device: torch.device, clock: Callable[[], float]
) -> float:
    value = contestant.make_input()
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
    """Bytes that one call holds at its peak beyond those held before it.

    On a GPU the caching allocator counts. On the CPU torch's allocator reports every allocation and
    release to the profiler, temporaries inside an operator included; the resident size of the
    process would also count what the C library keeps for later.

    Args:
        contestant: what to call once.
        device: where its tensors live.
    """
    value = contestant.make_input()
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


def share_outside_convolution(contestant: Contestant, device: torch.device) -> float:
    """Part of a call's time that is not spent in convolutions, forward or backward, in [0, 1]."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] + ([kinds.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profile:
        contestant.call(None)
        _synchronize(device)
    total = convolution = 0.0
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time the operator that launched it has too
        if device.type == "cuda":
            # torch < 2.4 calls it cuda, not device.
            seconds = getattr(event, "self_device_time_total", None)
            seconds = event.self_cuda_time_total if seconds is None else seconds
        else:
            seconds = event.self_cpu_time_total
        total += seconds
        convolution += seconds if "conv" in event.key.lower() else 0.0
    return 1 - convolution / total
