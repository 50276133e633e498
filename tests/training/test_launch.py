"""Launching: by itself, by torchrun, on several machines, by SLURM; and stopping."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from atss.training import launch
from atss.training.launch import Place, launched_place
from atss.training.signals import STOPPED, StopRequest
from atss.training.slurm import parse_slurm_options
from conftest import REPO

from detectron2.utils import comm

PROGRAM = str(Path(__file__).with_name("launched.py"))
BASE = [PROGRAM, "--config-file", "none"]
JOB = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command, **environment):
    path = os.pathsep.join([str(REPO / "projects/ATSS"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(*options):
    return ["-m", "torch.distributed.run", *options]


def reports(folder):
    found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return sorted(found, key=lambda report: report["rank"])


@pytest.mark.parametrize(
    "command",
    [
        [*BASE, "--num-gpus", "2"],
        [*torchrun("--standalone", "--nproc-per-node", "2"), *BASE],
    ],
    ids=["spawn", "torchrun"],
)
def test_two_processes_form_one_group(command, tmp_path):
    process = start([*command, "report", str(tmp_path)])
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    first, second = reports(tmp_path)
    assert first["total"] == second["total"] == 3  # 1 + 2
    assert (second["rank"], second["local_rank"], second["local_size"]) == (1, 1, 2)


def test_two_torchrun_agents_are_two_machines_whose_connections_are_tested(tmp_path):
    port = str(free_port())
    nodes = [
        start(
            [*torchrun("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2"),
             "--master-addr", "127.0.0.1", "--master-port", port, *BASE, "report", str(tmp_path)]
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    found = reports(tmp_path)
    assert [report["total"] for report in found] == [10] * 4
    assert [report["local_rank"] for report in found] == [0, 1, 0, 1]
    assert [report["local_size"] for report in found] == [2] * 4


def test_interface_that_does_not_exist_is_named_with_its_rank():
    url = f"tcp://127.0.0.1:{free_port()}"
    machines = [
        start(
            [
                *BASE,
                "--num-machines",
                "2",
                "--machine-rank",
                str(rank),
                "--dist-url",
                url,
                "report",
            ],
            GLOO_SOCKET_IFNAME="nowhere0",
        )
        for rank in range(2)
    ]
    for rank, machine in enumerate(machines):
        output, _ = machine.communicate(timeout=180)
        assert machine.returncode == 1
        last = output.strip().splitlines()[-1]
        assert f"Rank {rank} on" in last and "network interface nowhere0" in last, output


def test_processes_started_by_another_program_refuse_a_number_of_their_own(tmp_path):
    command = torchrun("--standalone", "--nproc-per-node", "1")
    process = start([*command, *BASE, "--num-gpus", "2", "report", str(tmp_path)])
    output, _ = process.communicate(timeout=180)
    assert process.returncode != 0 and "leave out --num-gpus" in output


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_of_gloo_outlives_a_job():
    """Detectron2 keeps groups; a thread of theirs at Python's end aborted one process in five."""

    def gloo_threads():
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        return sum("gloo" in name for name in names)

    url = f"tcp://127.0.0.1:{free_port()}"
    before = gloo_threads()
    with launch._process_group(Place(0, 1, 0, 1), url, timedelta(seconds=60), "cpu"):
        torch.distributed.all_reduce(torch.ones(1), group=comm._get_global_gloo_group())
        assert gloo_threads() > before
    assert gloo_threads() == before


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        ({**JOB, **MEETING}, Place(3, 4, 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, 0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, Place(1, 2, 0, 1)),  # a pod for each
    ],
)
def test_place_is_read_from_the_environment(environment, place):
    assert launched_place(environment) == place


@pytest.mark.parametrize(
    "change, message",
    [
        ({"RANK": "x"}, "whole numbers"),
        ({"RANK": "4"}, "counted from 0"),
        ({"LOCAL_RANK": "2"}, "counted from 0"),
        ({"LOCAL_WORLD_SIZE": "3"}, "as many processes"),
        ({"LOCAL_WORLD_SIZE": "0"}, "counted from 0"),
    ],
)
def test_environment_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        launched_place({**JOB, **MEETING, **change})
    with pytest.raises(ValueError, match="not MASTER_ADDR and MASTER_PORT.*torchrun"):
        launched_place(JOB)


@pytest.mark.parametrize(
    "number, to_one", [(signal.SIGTERM, False), (signal.SIGUSR1, True)], ids=["parent", "one"]
)
def test_signal_stops_all_processes_after_the_same_step(number, to_one, tmp_path):
    process = start([*BASE, "--num-gpus", "2", "steps", str(tmp_path)])
    deadline = time.time() + 120
    while len(pids := list(tmp_path.glob("*.pid"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    if to_one:  # one process of the job, as a machine that is taken away
        os.kill(int(pids[0].stem), number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == STOPPED, output
    stopped = [path.name.split("_")[1:] for path in tmp_path.glob("stopped_*")]
    assert sorted(rank for rank, _ in stopped) == ["0", "1"]
    assert len({step for _, step in stopped}) == 1


@pytest.mark.parametrize("seconds, code", [(0, 0), (0.3, -signal.SIGTERM)])
def test_second_signal_ends_a_process_unless_it_is_the_same_request(seconds, code):
    program = (
        "import os, signal, time\n"
        "from atss.training import signals\n"
        "signals.SAME_SIGNAL = 0.2\n"
        "with signals.StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    time.sleep({seconds})\n"
        "    print(stop.signal, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    process = start(["-c", program])
    output, _ = process.communicate(timeout=180)
    assert process.returncode == code
    assert output.strip().splitlines()[-1] == str(int(signal.SIGTERM))


def test_in_a_job_of_submitit_its_handler_queues_the_job_again_and_sees_sigterm():
    seen = []
    numbers = (signal.SIGUSR2, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: seen.append(number)) for n in numbers}
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)  # which submitit passes over
            assert seen == [signal.SIGTERM] and stop.signal is None
            os.kill(os.getpid(), signal.SIGUSR2)
            assert seen == [signal.SIGTERM] and stop.signal == signal.SIGUSR2
            with pytest.raises(SystemExit) as end:
                stop.exit()
        assert seen == [signal.SIGTERM, signal.SIGUSR2] and end.value.code == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_slurm_options_are_read_or_named():
    assert parse_slurm_options("timeout_min=60,slurm_partition=gpu") == {
        "timeout_min": 60,
        "slurm_partition": "gpu",
    }
    assert parse_slurm_options("") == {}
    with pytest.raises(ValueError, match="--slurm takes name=value.*got 'gpu'"):
        parse_slurm_options("gpu")


def test_job_of_a_cluster_runs_the_tool_in_all_its_tasks(tmp_path):
    pytest.importorskip("submitit")
    options = f"cluster=local,folder={tmp_path / 'jobs'},timeout_min=2"
    command = [*BASE, "--num-gpus", "2", "--slurm", options, "report", str(tmp_path)]
    process = start(command)
    output, _ = process.communicate(timeout=180)
    logs = "".join(path.read_text() for path in (tmp_path / "jobs").glob("*.err"))
    assert process.returncode == 0 and "Submitted job" in output, output
    assert [report["total"] for report in reports(tmp_path)] == [3, 3], logs
    assert "--slurm" not in reports(tmp_path)[0]["argv"]
