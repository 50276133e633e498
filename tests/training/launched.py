"""Programs that the tests of launching start as processes."""

import json
import os
import sys
import time

import torch
from atss.training.command_line import run, training_parser
from atss.training.signals import StopRequest
from atss.training.step_report import share_step

from detectron2.utils import comm


def main(args):
    what = args.opts[0]
    if what == "report":
        total = torch.tensor(comm.get_rank() + 1.0)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        facts = {
            "rank": comm.get_rank(),
            "world_size": comm.get_world_size(),
            "local_rank": comm.get_local_rank(),
            "local_size": comm.get_local_size(),
            "total": total.item(),
            "argv": sys.argv[1:],
        }
        with open(os.path.join(args.opts[1], f"{comm.get_rank()}.json"), "w") as file:
            json.dump(facts, file)
    elif what == "mistake":
        raise ValueError("a user's mistake")
    elif what == "steps":
        with StopRequest() as stop:
            open(os.path.join(args.opts[1], f"{os.getpid()}.pid"), "w").close()
            for step in range(2000):
                time.sleep(0.02)
                report = share_step({"loss": torch.tensor(1.0)}, 0.0, stop.signal is not None)
                if report.is_stop_asked:
                    path = os.path.join(args.opts[1], f"stopped_{comm.get_rank()}_{step}")
                    open(path, "w").close()
                    stop.exit()


if __name__ == "__main__":
    run(main, training_parser("").parse_args())
