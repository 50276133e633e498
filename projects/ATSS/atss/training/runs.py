"""Training runs: optimizer, steps and hooks as a config says."""

import logging
from functools import partial
from typing import Any, Callable, Iterable, List, Optional, Sequence

import torch
from omegaconf import DictConfig
from torch import nn

from detectron2.config import CfgNode, instantiate
from detectron2.engine import HookBase, default_writers, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..checkpoint import ATSSCheckpointer
from ..device import compile_dense_parts
from .evaluation import Results, evaluate_lazy
from .loop import StepTrainer, autocast_dtype, create_ddp_model
from .metrics_file import MetricsWriter
from .models import build_model, load_for_training, make_checkpointer
from .nonfinite import NonFiniteGuard
from .random_state import RandomState
from .saving import CheckpointHook, EvalHook
from .settings import Config, checkpoint_settings, get_setting

logger = logging.getLogger(__name__)


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a LazyConfig over the parameters of a model."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    cfg.optimizer.params.model = None
    return optimizer


def build_step_trainer(
    cfg: Config, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer
) -> StepTrainer:
    """What runs a step: compiled, distributed, in mixed precision as a config of either kind says.

    Raises:
        ValueError: see `compile_dense_parts`, `autocast_dtype`.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    logger.info("Model of %.2f million parameters:\n%s", count / 1e6, model)
    if get_setting(cfg, "compile", False):
        compile_dense_parts(model)
    device = next(model.parameters()).device
    precision = get_setting(cfg, "amp_precision", "float16")
    dtype = autocast_dtype(get_setting(cfg, "amp"), precision, device)
    options = {"broadcast_buffers": False} if isinstance(cfg, CfgNode) else cfg.train.ddp
    model = create_ddp_model(model, **options)
    return StepTrainer(model, data_loader, optimizer, dtype, build_guard(cfg, dtype))


def build_guard(cfg: Config, dtype: Optional[torch.dtype]) -> NonFiniteGuard:
    """What a run does with losses that are not finite."""
    max_skips = get_setting(cfg, "max_nonfinite_steps", 0)
    return NonFiniteGuard(get_setting(cfg, "output_dir"), max_skips, dtype)


class StopHook(HookBase):
    """Saves and leaves the process after a step in which a process was asked to stop.

    Args:
        step_trainer: whose steps are watched.
        saving: writes the checkpoint.
    """

    def __init__(self, step_trainer: StepTrainer, saving: CheckpointHook):
        self.step_trainer = step_trainer
        self.saving = saving

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if self.step_trainer.report.is_stop_asked and iteration + 1 < self.trainer.max_iter:
            self.saving.save_now(iteration)
            self.saving.finish()
            logger.warning("Asked to stop: iteration %d is saved, --resume goes on.", iteration)
            self.step_trainer.stop.exit()


def build_hooks(
    cfg: Config,
    step_trainer: StepTrainer,
    checkpointer: ATSSCheckpointer,
    scheduler: Any,
    evaluate: Callable[[], Optional[Results]],
    build_writers: Callable[[], List[EventWriter]],
    before_saving: Sequence[HookBase] = (),
    before_writing: Sequence[HookBase] = (),
) -> List[Optional[HookBase]]:
    """What a run of either kind does after each step, in this order.

    A checkpoint is written before the evaluation, so that it is there if that fails.

    Args:
        cfg: of either kind.
        step_trainer: of `build_step_trainer`.
        checkpointer: of `make_checkpointer`.
        scheduler: of the learning rate, as `hooks.LRScheduler` takes it.
        evaluate: called every eval_period iterations and at the end.
        build_writers: makes the writers, on the main process.
        before_saving, before_writing: further hooks; what the latter record is written.
    """
    log_period = 20 if isinstance(cfg, CfgNode) else cfg.train.log_period
    folder = get_setting(cfg, "output_dir")
    random_state = RandomState(get_setting(cfg, "seed", -1))
    saving = CheckpointHook(checkpointer, **checkpoint_settings(cfg), random_state=random_state)
    is_main = comm.is_main_process()
    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=scheduler),
        *before_saving,
        saving,
        StopHook(step_trainer, saving),
        EvalHook(get_setting(cfg, "eval_period"), evaluate, folder, saving.note),
        *before_writing,
        MetricsWriter(build_writers, folder, log_period) if is_main else None,
    ]


def train_lazy(
    cfg: DictConfig, resume: bool = False, extra_hooks: Sequence[HookBase] = ()
) -> Optional[Results]:
    """Train as a LazyConfig says, in this worker.

    Args:
        cfg: with `model`, `optimizer`, `lr_multiplier`, `dataloader` and `train`.
        resume: continue from the last checkpoint in `train.output_dir`.
        extra_hooks: registered before the writers, so that they see what these write.

    Returns:
        Results of the last evaluation on the main process, None if there was none.

    Raises:
        FileNotFoundError, ValueError: see `load_for_training`.
        FloatingPointError: the loss became infinite or NaN.
    """
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    trainer = build_step_trainer(cfg, model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = make_checkpointer(cfg, trainer.model, trainer=trainer)
    results: List[Optional[Results]] = [None]

    def evaluate() -> Optional[Results]:
        results[0] = evaluate_lazy(cfg, trainer.model)
        return results[0]

    trainer.register_hooks(
        build_hooks(
            cfg,
            trainer,
            checkpointer,
            instantiate(cfg.lr_multiplier),
            evaluate,
            partial(default_writers, cfg.train.output_dir, cfg.train.max_iter),
            before_writing=extra_hooks,
        )
    )
    start = load_for_training(cfg, checkpointer, resume)
    with trainer.stop:
        trainer.train(start, cfg.train.max_iter)
    return results[0]
