"""One step of training, on any device and in any precision."""

import time
from typing import Any, Dict, Iterable, Optional

import torch
from torch import nn

from detectron2.engine import SimpleTrainer, defaults
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

from ..device import has_fast_bfloat16
from .nonfinite import NonFiniteGuard
from .signals import StopRequest
from .step_report import StepReport, share_step

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast_dtype(enabled: bool, precision: str, device: torch.device) -> Optional[torch.dtype]:
    """Type that autocast computes in.

    Args:
        enabled: whether mixed precision was asked for.
        precision: "float16", "bfloat16", or "auto": bfloat16 where the device computes in it
            natively, else full precision.
        device: of the model.

    Returns:
        The type, or None for full precision.

    Raises:
        ValueError: for an unknown precision, or float16 without a GPU.
    """
    if not enabled:
        return None
    if precision == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else None
    if precision not in _DTYPES:
        raise ValueError(
            f"Unknown amp precision {precision!r}; known are {['auto', *_DTYPES]} "
            "(train.amp.precision, SOLVER.AMP.PRECISION)."
        )
    if precision == "float16" and device.type != "cuda":
        raise ValueError(
            f"Mixed precision in float16 needs a GPU, the model is on {device.type!r}. Set "
            "train.amp.precision (SOLVER.AMP.PRECISION) to 'bfloat16'."
        )
    return _DTYPES[precision]


def make_grad_scaler(dtype: Optional[torch.dtype]) -> Optional[Any]:
    """A new `GradScaler` for an autocast type; None where it needs none.

    Small gradients become 0 in float16. bfloat16 has the range of float32.
    """
    if dtype != torch.float16:
        return None
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda")
    return torch.cuda.amp.GradScaler()  # torch < 2.3


class StepTrainer(SimpleTrainer):
    """Detectron2's `SimpleTrainer` with mixed precision that does not need CUDA.

    Args:
        model: training model, perhaps wrapped for data parallelism.
        data_loader: iterable over batches; one with `state_dict` resumes where it was.
        optimizer: of the model.
        dtype: autocast type, None for full precision.
        guard: what happens to a loss that is not finite; by default training stops.

    Attributes:
        report: of the last step, the same on every process.
        stop: whether a signal asked this process for a stop.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        dtype: Optional[torch.dtype] = None,
        guard: Optional[NonFiniteGuard] = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.dtype = dtype
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = make_grad_scaler(dtype)
        self.guard = guard or NonFiniteGuard(dtype=dtype)
        self.stop = StopRequest()
        self.report: Optional[StepReport] = None

    def run_step(self) -> None:
        """One batch: forward, backward, update."""
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            losses = self.model(data)
        total = sum(losses.values())
        self.optimizer.zero_grad()
        (total if self.grad_scaler is None else self.grad_scaler.scale(total)).backward()
        # The one wait of a step on a GPU: all processes decide together on the update.
        self.report = share_step(losses, data_time, self.stop.signal is not None)
        if not self.guard.must_skip(self.report, self.iter, data, self.model):
            update(self.optimizer, self.grad_scaler)
        record_step(get_event_storage(), self.report, self.guard, self.grad_scaler)

    def state_dict(self) -> Dict[str, Any]:
        state = {**super().state_dict(), "guard": self.guard.state_dict()}
        for name, part in self._parts().items():
            state[name] = part.state_dict()
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name, part in {"guard": self.guard, **self._parts()}.items():
            if name in state_dict:
                part.load_state_dict(state_dict[name])

    def _parts(self) -> Dict[str, Any]:
        """What has a state only in some runs."""
        parts = {"grad_scaler": self.grad_scaler, "data_loader": self.data_loader}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def update(optimizer: torch.optim.Optimizer, grad_scaler: Optional[Any]) -> None:
    """Change the weights by their gradients.

    Where these overflowed in float16, the scaler leaves the weights and lowers its scale.
    """
    if grad_scaler is None:
        optimizer.step()
    else:
        grad_scaler.step(optimizer)
        grad_scaler.update()


def record_step(
    storage: EventStorage, report: StepReport, guard: NonFiniteGuard, grad_scaler: Optional[Any]
) -> None:
    """Put the numbers of a step into the event storage, on the main process.

    Args:
        storage: of the run.
        report: of the step; its losses are left out where one is not finite.
        guard: whose skipped steps are counted, once there are some.
        grad_scaler: whose scale is read every 20 iterations, because a GPU has to finish for it; a
            scale that falls tells of gradients that overflow in float16.
    """
    if not comm.is_main_process():
        return
    storage.put_scalar("data_time", report.data_time)
    if not report.failed:
        storage.put_scalar("total_loss", report.total)
        if len(report.losses) > 1:
            storage.put_scalars(**report.losses)
    if guard.total_skipped:
        storage.put_scalar("skipped_steps", guard.total_skipped, smoothing_hint=False)
    if grad_scaler is not None and storage.iter % 20 == 19:
        storage.put_scalar("grad_scale", grad_scaler.get_scale(), smoothing_hint=False)


def create_ddp_model(model: nn.Module, **options: Any) -> nn.Module:
    """Detectron2's function of this name, with its options, for models on the CPU too."""
    device = next(model.parameters()).device
    options.setdefault("device_ids", [device.index] if device.type == "cuda" else None)
    return defaults.create_ddp_model(model, **options)
