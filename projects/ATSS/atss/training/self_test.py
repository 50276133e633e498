"""Test of the connections between several machines, before a run depends on them."""

import json
import logging
import os
import platform
import time
from datetime import timedelta
from typing import Dict, List

import torch
from torch import distributed as dist

import detectron2

logger = logging.getLogger(__name__)

_SECONDS = 20
_MAX_SKEW = 5.0  # seconds between clocks
_INTERFACE = "GLOO_SOCKET_IFNAME"


def check_connections(
    store: dist.Store,
    rank: int,
    world_size: int,
    local_world_size: int,
    timeout: timedelta,
    seconds: float = _SECONDS,
) -> None:
    """Refuse a job whose machines do not reach each other, or run other versions.

    One machine is not tested. Machines may start minutes apart: the test begins when all processes
    are there.

    Args:
        store: which all processes have reached.
        rank, world_size, local_world_size: of this process.
        timeout: how long to wait for the other processes.
        seconds: how long the test may take once they are there.

    Raises:
        ConnectionError: naming the ranks that did not come, or this one and what it cannot reach.
        ValueError: naming the ranks that run another version.
    """
    if world_size == local_world_size and "ATSS_SELF_TEST" not in os.environ:
        return
    store = dist.PrefixStore("self_test", store)
    store.set(f"facts/{rank}", json.dumps(_facts()))
    facts = {other: json.loads(text) for other, text in _wait(store, "facts", world_size, timeout)}
    store.set(f"time/{rank}", json.dumps(time.time()))
    _compare_versions(facts)
    limit = timedelta(seconds=seconds)
    try:
        group = dict(rank=rank, world_size=world_size, timeout=limit)
        dist.init_process_group("gloo", store=dist.PrefixStore("group", store), **group)
        total = torch.ones(1)
        dist.all_reduce(total)
        times = [json.loads(text) for _, text in _wait(store, "time", world_size, limit)]
    except RuntimeError as error:
        raise ConnectionError(
            f"Rank {rank} on {facts[rank]['host']} cannot exchange data with the other processes "
            f"within {seconds:.0f} s (network interface {facts[rank]['interface']}): "
            f"{str(error).splitlines()[0]} Set {_INTERFACE} and NCCL_SOCKET_IFNAME to the "
            "interface that connects the machines, and open its ports."
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if int(total) != world_size:
        raise ConnectionError(f"{world_size} processes sum to {int(total)} on rank {rank}.")
    if rank == 0 and max(times) - min(times) > _MAX_SKEW:
        logger.warning(
            "The clocks of the machines differ by %.0f s: times in their logs do not compare.",
            max(times) - min(times),
        )


def _facts() -> Dict[str, str]:
    return {
        "host": platform.node(),
        "interface": os.environ.get(_INTERFACE, "chosen by the system"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
    }


def _wait(store: dist.Store, name: str, world_size: int, timeout: timedelta) -> List:
    """(rank, text) of all processes."""
    keys = [f"{name}/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise ConnectionError(
            f"Rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} did not come within "
            f"{timeout.total_seconds():.0f} s. Check that every machine was started, each with its "
            "own --machine-rank (torchrun: --node-rank)."
        ) from error
    return [(rank, store.get(key).decode()) for rank, key in enumerate(keys)]


def _compare_versions(facts: Dict[int, Dict[str, str]]) -> None:
    for name in ("python", "torch", "detectron2"):
        others = [rank for rank, found in facts.items() if found[name] != facts[0][name]]
        if others:
            raise ValueError(
                f"Rank {others[0]} on {facts[others[0]]['host']} runs {name} "
                f"{facts[others[0]][name]}, rank 0 on {facts[0]['host']} {facts[0][name]}. Install "
                "the same versions on all machines."
            )
