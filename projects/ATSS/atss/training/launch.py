"""Launching a run as several processes, with or without GPUs.

Detectron2's `launch` demands CUDA up to version 0.6; this one uses gloo on the CPU.
"""

import socket
from datetime import timedelta
from typing import Any, Callable, Dict, Tuple

import torch
from torch import distributed as dist
from torch import multiprocessing

from detectron2.utils import comm


def launch(
    main_func: Callable[..., Any],
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Tuple = (),
    timeout: timedelta = timedelta(minutes=30),
    device: str = "cuda",
) -> None:
    """Run a function in every worker of a distributed job.

    Args:
        main_func: called as `main_func(*args)`; must be importable by the workers.
        num_processes: workers on this machine; with GPUs at most as many as there are.
        num_machines: how many machines call this.
        machine_rank: which of them this is.
        dist_url: where workers meet, e.g. "tcp://127.0.0.1:8686"; "auto" finds a free port and
            serves one machine.
        args: of `main_func`.
        timeout: how long a worker waits for the others.
        device: where the models of the workers live: "cpu" leaves GPUs alone, "cuda" takes them if
            there are any.

    Raises:
        ValueError: for no workers or more than GPUs, a machine that is not among those there are,
            or "auto" with several machines.
    """
    world_size = num_machines * num_processes
    if num_processes < 1:
        raise ValueError(f"A run needs at least one process, got --num-gpus {num_processes}.")
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"Machines are counted from 0, got --machine-rank {machine_rank} of --num-machines "
            f"{num_machines}."
        )
    if world_size == 1:
        main_func(*args)
        return
    backend = choose_backend(device)
    if backend == "nccl" and num_processes > torch.cuda.device_count():
        raise ValueError(
            f"{num_processes} processes need as many GPUs, this machine has "
            f"{torch.cuda.device_count()}. Lower --num-gpus, or set train.device (MODEL.DEVICE) to "
            "'cpu' for CPU processes."
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("dist_url='auto' serves one machine; give several a common address.")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    group = dict(backend=backend, init_method=dist_url, world_size=world_size, timeout=timeout)
    multiprocessing.spawn(
        _worker,
        nprocs=num_processes,
        args=(main_func, args, group, num_processes, machine_rank),
    )


def choose_backend(device: str) -> str:
    """How workers talk whose models live on a device: NCCL can only do so between GPUs.

    Args:
        device: such as "cpu" or "cuda".

    Returns:
        "nccl", or "gloo" for the CPU and where there is no GPU.
    """
    return "nccl" if device.startswith("cuda") and torch.cuda.is_available() else "gloo"


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(
    local_rank: int,
    main_func: Callable[..., Any],
    args: Tuple,
    group: Dict[str, Any],
    num_processes: int,
    machine_rank: int,
) -> None:
    dist.init_process_group(rank=machine_rank * num_processes + local_rank, **group)
    try:
        _create_local_group(num_processes, machine_rank, group["world_size"])
        if group["backend"] == "nccl":
            torch.cuda.set_device(local_rank)
        comm.synchronize()
        main_func(*args)
    finally:
        dist.destroy_process_group()


def _create_local_group(num_processes: int, machine_rank: int, world_size: int) -> None:
    """The workers of one machine, which `comm.get_local_rank` and data loading ask for."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_processes)
        return
    for first in range(0, world_size, num_processes):
        local_group = dist.new_group(list(range(first, first + num_processes)))
        if first == machine_rank * num_processes:
            comm._LOCAL_PROCESS_GROUP = local_group
