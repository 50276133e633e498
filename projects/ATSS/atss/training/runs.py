"""Runs: models and trainers built, trained and evaluated as a config says."""

import logging
import os
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detectron2.config import CfgNode, instantiate
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.modeling import build_model as build_yaml_model
from detectron2.utils import comm

from ..checkpoint import (
    ATSSCheckpointer,
    Loaded,
    load_or_resume,
    override_config,
    require_weights,
)
from ..data import common_classes
from ..device import compile_dense_parts, to_channels_last
from ..inference_mode import prepare_as_configured
from ..tta import ATSSWithTTA, make_views, release_views
from .loop import StepTrainer, autocast_dtype, create_ddp_model
from .saved_configs import save_config
from .settings import Config, available_device, data_class_names, get_setting, key_of

logger = logging.getLogger(__name__)

Results = Dict[str, Any]


def build_model(cfg: Config) -> nn.Module:
    """The model of a config of either kind, in its memory format, on its device if that exists."""
    if isinstance(cfg, CfgNode):
        model = build_yaml_model(cfg)
    else:
        model = instantiate(cfg.model).to(available_device(cfg))
    if get_setting(cfg, "channels_last", False):
        model = to_channels_last(model)
    return model


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
    return StepTrainer(create_ddp_model(model, **options), data_loader, optimizer, dtype)


def evaluate_lazy(cfg: DictConfig, model: nn.Module) -> Optional[Results]:
    """Evaluate on `dataloader.test` with `dataloader.evaluator`, where the config has them.

    Returns:
        Results such as {"bbox": {"AP": ...}} in percent on the main process; None without a set.
    """
    if "evaluator" not in cfg.dataloader or not cfg.dataloader.test.dataset.names:
        return None
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    if comm.is_main_process():
        print_csv_format(results)
    return results


def evaluate_with_tta(
    cfg: Config, model: nn.Module, evaluate: Callable[..., Optional[Results]] = evaluate_lazy
) -> Results:
    """Evaluate with the test-time augmentation of a config of either kind.

    Returns:
        Results of `evaluate(cfg, augmented_model)`, under names that end in "_TTA".
    """
    if isinstance(cfg, CfgNode):
        augmented = ATSSWithTTA(cfg, model)
    else:
        tta = OmegaConf.to_container(cfg.train.tta)
        del tta["enabled"]
        base_size = tta.pop("base_size")
        scales = [tta.pop(key) for key in ("min_sizes", "max_size", "flip", "size_ranges")]
        min_sizes, max_size, flip, _ = scales
        if min_sizes is None:
            views = release_views(flip, base_size, max_size)
        else:
            views = make_views(*scales)
        augmented = ATSSWithTTA(model, views, **tta)
    results = evaluate(cfg, augmented) or {}
    return {f"{name}_TTA": result for name, result in results.items()}


def evaluate_checkpoint(
    cfg: Config,
    resume: bool = False,
    build: Callable[..., nn.Module] = build_model,
    evaluate: Callable[..., Optional[Results]] = evaluate_lazy,
    evaluate_tta: Callable[..., Results] = evaluate_with_tta,
) -> Results:
    """Evaluate the weights of a config, or the last checkpoint: what --eval-only does.

    The model is prepared as `train.prepare` (TEST.PREPARE) says, and evaluated without, then with
    test-time augmentation, if `train.tta` (TEST.AUG) is enabled.

    Args:
        cfg: of either kind.
        resume: take the last checkpoint of the output folder.
        build: makes the model of `cfg`.
        evaluate, evaluate_tta: take `cfg` and the model.

    Returns:
        Results of `evaluate` and `evaluate_tta`.

    Raises:
        FileNotFoundError, ValueError: no weights, weights that do not fit the model or the classes
            of the data, or see `load_or_resume`, `prepare_as_configured`.
    """
    weights = get_setting(cfg, "weights")
    if not weights and not resume:
        raise ValueError(
            "--eval-only has no weights, and would evaluate random ones. Name a checkpoint in "
            "train.init_checkpoint (MODEL.WEIGHTS), or add --resume for the last one of the output "
            "folder."
        )
    model = build(cfg)
    checkpointer = ATSSCheckpointer(model, get_setting(cfg, "output_dir"))
    names = load_or_resume(checkpointer, weights, resume).class_names
    if names is None:
        logger.warning(
            "These weights do not name their classes: only their number is compared with the data."
        )
    for name, data_names in data_class_names(cfg, "val_sets").items() if names else ():
        common_classes([("The weights", names), (name, data_names)])
    settings = get_setting(cfg, "prepare", {"enabled": False})
    settings = {key.lower(): value for key, value in settings.items()}
    model = prepare_as_configured(model, settings)
    results = evaluate(cfg, model) or {}
    if get_setting(cfg, "tta", False):
        results.update(evaluate_tta(cfg, model))
    return results


def say_if_finished(cfg: Config, start_iter: int) -> None:
    """Say that a resumed run has no iteration left."""
    if start_iter >= get_setting(cfg, "max_iter"):
        logger.warning(
            "This run is finished: its last checkpoint has %d iterations. Raise %s to train on.",
            start_iter,
            key_of(cfg, "max_iter"),
        )


def make_checkpointer(cfg: Config, model: nn.Module, **checkpointables: Any) -> ATSSCheckpointer:
    """Checkpointer of a run of either kind, which knows the classes of its data."""
    names = next(iter(data_class_names(cfg, "train_sets").values()), None)
    folder = get_setting(cfg, "output_dir")
    return ATSSCheckpointer(model, folder, class_names=names, **checkpointables)


def load_for_training(cfg: Config, checkpointer: ATSSCheckpointer, resume: bool) -> Loaded:
    """Load what a run starts from; initial weights need not have all parameters.

    Settings that the weights change in the model are put into the config, in `cfg` and in the copy
    in the run's folder, so that this describes the model.

    Args:
        cfg: of either kind; changed in place.
        checkpointer: of `make_checkpointer`.
        resume: continue from the last checkpoint of the run's folder.

    Raises:
        FileNotFoundError, ValueError: see `load_or_resume`.
    """
    weights = get_setting(cfg, "weights")
    loaded = load_or_resume(checkpointer, weights, resume, allow_partial=True)
    if loaded.class_names and loaded.class_names != checkpointer.class_names:
        logger.warning(
            "The weights were trained on other classes (%s, ...) than those of the data (%s, ...): "
            "the class predictor starts from theirs where their number is the same.",
            ", ".join(loaded.class_names[:3]),
            ", ".join((checkpointer.class_names or ["unknown"])[:3]),
        )
    if not loaded.changes:
        return loaded
    is_yaml = isinstance(cfg, CfgNode)
    if is_yaml:
        is_frozen = cfg.is_frozen()
        cfg.defrost()
    override_config(cfg, loaded.changes)
    if is_yaml and is_frozen:
        cfg.freeze()
    folder = get_setting(cfg, "output_dir")
    if comm.is_main_process() and os.path.isdir(folder):
        save_config(cfg, os.path.join(folder, "config.yaml"))
    return loaded


def train_lazy(
    cfg: DictConfig, resume: bool = False, extra_hooks: Sequence[hooks.HookBase] = ()
) -> Optional[Results]:
    """Train as a LazyConfig says, in this worker.

    Args:
        cfg: with `model`, `optimizer`, `lr_multiplier`, `dataloader` and `train`.
        resume: continue from the last checkpoint in `train.output_dir`.
        extra_hooks: registered before the writers, so that they see what these write.

    Returns:
        Results of the last evaluation on the main process, None if there was none.

    Raises:
        FileNotFoundError: nothing to resume, or the initial weights are missing.
        ValueError: initial weights that match no parameter.
        FloatingPointError: the loss became infinite or NaN.
    """
    train = cfg.train
    model = build_model(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    cfg.optimizer.params.model = None
    # Before the data are loaded, which takes long.
    require_weights(train.output_dir, train.init_checkpoint, resume)
    trainer = build_step_trainer(cfg, model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = make_checkpointer(cfg, trainer.model, trainer=trainer)
    results: List[Optional[Results]] = [None]

    def evaluate():
        results[0] = evaluate_lazy(cfg, trainer.model)
        return results[0]

    is_main = comm.is_main_process()
    writers = default_writers(train.output_dir, train.max_iter) if is_main else []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer) if is_main else None,
            hooks.EvalHook(train.eval_period, evaluate),
            *extra_hooks,
            hooks.PeriodicWriter(writers, period=train.log_period) if is_main else None,
        ]
    )
    load_for_training(cfg, checkpointer, resume)
    # A checkpoint holds the iteration that was just finished.
    start = trainer.iter + 1 if resume else 0
    say_if_finished(cfg, start)
    trainer.train(start, train.max_iter)
    return results[0]
