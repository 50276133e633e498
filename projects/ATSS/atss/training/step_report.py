"""What all processes of a run know of a step: its losses, and whether to go on."""

from typing import Dict, List, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from detectron2.utils import comm


class StepReport(NamedTuple):
    """The same on every process.

    Attributes:
        losses: terms by name, mean over processes.
        data_time: longest wait for data of a process, in seconds.
        failed: {rank: names of its terms that are not finite}, without ranks where all are.
        is_stop_asked: whether a process was asked to stop.
    """

    losses: Dict[str, float]
    data_time: float
    failed: Dict[int, List[str]]
    is_stop_asked: bool

    @property
    def total(self) -> float:
        return sum(self.losses.values())


def share_step(
    losses: Dict[str, Tensor], data_time: float = 0.0, is_stop_asked: bool = False
) -> StepReport:
    """Tell all processes the losses of each; call it before the update of the weights.

    One exchange of a few numbers. It reads the losses, for which a GPU has to finish what is
    queued: call it once backward is queued, and ask for nothing else in the step.

    Args:
        losses: terms by name, the same names on every process; scalars.
        data_time: how long this process waited for its batch, in seconds.
        is_stop_asked: whether this process was asked to stop.
    """
    names = list(losses)
    values = torch.stack([loss.detach().double().reshape(()) for loss in losses.values()])
    own = torch.cat((values, values.new_tensor([data_time, float(is_stop_asked)])))
    rows = [own]
    if comm.get_world_size() > 1:
        rows = [torch.empty_like(own) for _ in range(comm.get_world_size())]
        dist.all_gather(rows, own)
    table = torch.stack(rows).cpu()  # (processes, terms + 2)
    terms = table[:, :-2]
    is_bad = ~torch.isfinite(terms)
    failed = {
        rank: [name for name, bad in zip(names, row) if bad]
        for rank, row in enumerate(is_bad.tolist())
        if any(row)
    }
    means = terms.mean(dim=0).tolist()
    return StepReport(
        dict(zip(names, means)), table[:, -2].max().item(), failed, bool(table[:, -1].any())
    )
