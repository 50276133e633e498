"""Processes of a run: started here, or by torchrun and its like, on GPUs or the CPU.

Detectron2's `launch` demands CUDA up to version 0.6 and starts every process itself; here gloo
serves the CPU, and a process that was started by another program joins its job.
"""

import os
import signal
import socket
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import distributed as dist
from torch import multiprocessing

from detectron2.utils import comm

from .self_test import check_connections
from .signals import STOP_SIGNALS

_TIMEOUT = timedelta(minutes=30)


class Place(NamedTuple):
    """Which process of a job this is.

    Attributes:
        rank: among all processes.
        world_size: number of all processes.
        local_rank: among the processes of this machine.
        local_world_size: number of processes of each machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def launched_place(environment: Optional[Mapping[str, str]] = None) -> Optional[Place]:
    """What the program that started this process says about it; None if none did.

    torchrun, PyTorchJob, SageMaker, Ray Train and submitit set these variables. Without LOCAL_RANK
    and LOCAL_WORLD_SIZE, as in the pods of a PyTorchJob, each machine has one process.

    Args:
        environment: variables of the process, by default its own.

    Raises:
        ValueError: for variables that contradict each other, or an address that is missing.
    """
    environment = os.environ if environment is None else environment
    if not {"RANK", "WORLD_SIZE"} <= {*environment}:
        return None
    names = {
        "RANK": None,
        "WORLD_SIZE": None,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    found = {name: environment.get(name, default) for name, default in names.items()}
    try:
        place = Place(*(int(value) for value in found.values()))
    except ValueError as error:
        raise ValueError(f"The environment has {found}, which need to be whole numbers.") from error
    is_place = 0 <= place.rank < place.world_size
    is_place &= 0 <= place.local_rank < place.local_world_size
    if not is_place or place.world_size % max(place.local_world_size, 1):
        raise ValueError(
            f"The environment has {found}: ranks are counted from 0, and each machine has as many "
            "processes."
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing and place.world_size > 1:
        raise ValueError(
            f"The environment has RANK and WORLD_SIZE, but not {' and '.join(missing)}, where the "
            "processes meet. Start them with torchrun, or unset RANK and WORLD_SIZE."
        )
    return place


def launch(
    main_func: Callable[..., Any],
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Tuple = (),
    timeout: timedelta = _TIMEOUT,
    device: str = "cuda",
) -> None:
    """Run a function in every process of a job, which this starts on this machine.

    Args:
        main_func: called as `main_func(*args)`; must be importable by the processes.
        num_processes: processes on this machine; with GPUs at most as many as there are.
        num_machines: how many machines call this.
        machine_rank: which of them this is.
        dist_url: where processes meet, e.g. "tcp://127.0.0.1:8686"; "auto" finds a free port and
            serves one machine.
        args: of `main_func`.
        timeout: how long a process waits for the others.
        device: where the models live: "cpu" leaves GPUs alone, "cuda" takes them if there are any.

    Raises:
        ValueError: for no processes or more than GPUs, a machine that is not among those there are,
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
    _check_gpus(num_processes, device)
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("dist_url='auto' serves one machine; give several a common address.")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    first = Place(machine_rank * num_processes, world_size, 0, num_processes)
    group = dict(init_method=dist_url, timeout=timeout, device=device)
    processes = multiprocessing.spawn(
        _worker, nprocs=num_processes, args=(main_func, args, group, first), join=False
    )
    with _passing_on_signals(processes.pids()):
        while not processes.join():
            pass


def join_job(
    main_func: Callable[..., Any],
    place: Place,
    args: Tuple = (),
    timeout: timedelta = _TIMEOUT,
    device: str = "cuda",
) -> None:
    """Run a function in this process of a job that another program started.

    Args:
        main_func: called as `main_func(*args)`.
        place: of `launched_place`.
        args, timeout, device: see `launch`.

    Raises:
        ValueError: for more processes than GPUs.
    """
    if place.world_size == 1:
        main_func(*args)
        return
    _check_gpus(place.local_world_size, device)
    with _process_group(place, "env://", timeout, device):
        main_func(*args)


def choose_backend(device: str) -> str:
    """How processes talk whose models live on a device: NCCL can only do so between GPUs.

    Args:
        device: such as "cpu" or "cuda".

    Returns:
        "nccl", or "gloo" for the CPU and where there is no GPU.
    """
    return "nccl" if device.startswith("cuda") and torch.cuda.is_available() else "gloo"


def _check_gpus(num_processes: int, device: str) -> None:
    if choose_backend(device) == "nccl" and num_processes > torch.cuda.device_count():
        raise ValueError(
            f"{num_processes} processes need as many GPUs, this machine has "
            f"{torch.cuda.device_count()}. Lower --num-gpus (torchrun: --nproc-per-node), or set "
            "train.device (MODEL.DEVICE) to 'cpu' for CPU processes."
        )


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(
    local_rank: int,
    main_func: Callable[..., Any],
    args: Tuple,
    group: Dict[str, Any],
    first: Place,
) -> None:
    place = first._replace(rank=first.rank + local_rank, local_rank=local_rank)
    with _process_group(place, **group):
        main_func(*args)


@contextmanager
def _process_group(
    place: Place, init_method: str, timeout: timedelta, device: str
) -> Iterator[None]:
    backend = choose_backend(device)
    if backend == "nccl":
        torch.cuda.set_device(place.local_rank)
    meeting = dist.rendezvous(init_method, place.rank, place.world_size, timeout=timeout)
    store, *_ = next(meeting)
    store.set_timeout(timeout)
    # torchrun keeps its store when it starts processes again: addresses of the dead are in there.
    store = dist.PrefixStore(f"life_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    check_connections(store, place.rank, place.world_size, place.local_world_size, timeout)
    group = dict(rank=place.rank, world_size=place.world_size, timeout=timeout)
    dist.init_process_group(backend, store=dist.PrefixStore("run", store), **group)
    try:
        _create_local_group(place)
        comm.synchronize()
        yield
    finally:
        # Detectron2 keeps groups for good, and with them gloo's threads. One that is still letting
        # go of a message when Python ends would abort the process.
        comm._LOCAL_PROCESS_GROUP = None
        comm._get_global_gloo_group.cache_clear()
        dist.destroy_process_group()


def _create_local_group(place: Place) -> None:
    """The processes of one machine, which `comm.get_local_rank` and data loading ask for."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(place.local_world_size)
        return
    for first in range(0, place.world_size, place.local_world_size):
        local_group = dist.new_group(list(range(first, first + place.local_world_size)))
        if first == place.rank - place.local_rank:
            comm._LOCAL_PROCESS_GROUP = local_group


@contextmanager
def _passing_on_signals(pids) -> Iterator[None]:
    """Hand the signals that stop a run to the processes that this one started."""

    def pass_on(number: int, frame: Any) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
