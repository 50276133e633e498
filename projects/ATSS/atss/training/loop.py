"""One step of training, on any device and in any precision."""

import time
from typing import Any, Dict, Iterable, Optional

import torch
from torch import nn

from detectron2.engine import SimpleTrainer, defaults

from ..device import has_fast_bfloat16

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
        data_loader: iterable over batches.
        optimizer: of the model.
        dtype: autocast type, None for full precision.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.dtype = dtype
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = make_grad_scaler(dtype)

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
        if self.grad_scaler is None:
            total.backward()
            self.optimizer.step()
        else:
            self.grad_scaler.scale(total).backward()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        # Last, because it reads the losses: on a GPU that waits for all that is queued. Losses that
        # are not finite stop the training here, before this step's weights can be saved.
        self._write_metrics(losses, data_time)

    def state_dict(self) -> Dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def create_ddp_model(model: nn.Module, **options: Any) -> nn.Module:
    """Detectron2's function of this name, with its options, for models on the CPU too."""
    device = next(model.parameters()).device
    options.setdefault("device_ids", [device.index] if device.type == "cuda" else None)
    return defaults.create_ddp_model(model, **options)
