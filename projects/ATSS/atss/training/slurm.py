"""Tools as jobs of a SLURM cluster, through submitit: stopped jobs are queued again and resume."""

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Dict, List

_FOLDER = "slurm"  # of the jobs' logs


def parse_slurm_options(text: str) -> Dict[str, Any]:
    """Parameters of submitit from "name=value,name=value"; numbers become integers.

    Raises:
        ValueError: for a part without "=".
    """
    options: Dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, separator, value = part.partition("=")
        if not separator:
            raise ValueError(
                f"--slurm takes name=value,name=value such as timeout_min=1440,slurm_partition=gpu,"
                f" got {part!r}."
            )
        options[name] = int(value) if value.isdigit() else value
    return options


def submit_job(args: argparse.Namespace, device: str) -> None:
    """Submit the command that runs now, without waiting for it.

    Each machine becomes a node, each process a task. The job's log is in the folder "slurm".

    Args:
        args: of `training_parser`, with `slurm`.
        device: where the models live; "cpu" asks for no GPU.

    Raises:
        ValueError: without submitit, for options that it does not know, or without SLURM.
    """
    try:
        import submitit
    except ImportError as error:
        raise ValueError("--slurm needs submitit: pip install 'atss[slurm]'.") from error
    options = {
        "nodes": args.num_machines,
        "tasks_per_node": args.num_gpus,
        "gpus_per_node": args.num_gpus if device.startswith("cuda") else 0,
        "name": Path(sys.argv[0]).stem,
        **parse_slurm_options(args.slurm),
    }
    folder, cluster = options.pop("folder", _FOLDER), options.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**options)
    except (NameError, RuntimeError, TypeError) as error:
        raise ValueError(f"--slurm {args.slurm}: {error}") from error
    job = executor.submit(ToolJob(os.path.abspath(sys.argv[0]), _without_launch(sys.argv[1:])))
    print(f"Submitted job {job.job_id}; its log is {job.paths.stdout}.")
    if cluster != "slurm":
        job.wait()


class ToolJob:
    """A tool's command, as every task of a job runs it.

    Args:
        tool: path of the Python file.
        argv: its options, without those about processes.
    """

    def __init__(self, tool: str, argv: List[str]):
        self.tool = tool
        self.argv = argv

    def __call__(self) -> None:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        sys.argv = [self.tool, *self.argv]
        sys.path.insert(0, os.path.dirname(self.tool))
        runpy.run_path(self.tool, run_name="__main__")

    def checkpoint(self) -> Any:
        """The job that submitit queues when this one is stopped: the same, from its checkpoint."""
        import submitit

        argv = self.argv if "--auto-resume" in self.argv else ["--auto-resume", *self.argv]
        return submitit.helpers.DelayedSubmission(ToolJob(self.tool, argv))


def _without_launch(argv: List[str]) -> List[str]:
    """Options of a command without those about processes, which the job says itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--slurm", "--num-gpus", "--num-machines", "--machine-rank", "--dist-url"):
        parser.add_argument(name)
    return parser.parse_known_args(argv)[1]
