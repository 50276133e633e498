"""How does a LazyConfig become a trained model? The loop behind the Lazy training tool."""

import argparse
import logging
import os
from typing import Any, Dict, List, Optional, Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm

from ..checkpoint.checkpointer import ATSSCheckpointer, load_or_resume, load_to_evaluate
from ..data import register_from_arguments
from ..device import compile_dense_parts
from ..inference_mode.prepare import prepare_as_configured
from ..tta import ATSSWithTTA, make_views, release_views
from .loop import StepTrainer, autocast_dtype, create_ddp_model

__all__ = [
    "apply_overrides",
    "build_model",
    "choose_data",
    "evaluate_checkpoint",
    "evaluate_lazy",
    "evaluate_lazy_with_tta",
    "load_lazy_config",
    "train_lazy",
]

logger = logging.getLogger(__name__)


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A LazyConfig with overrides from the command line.

    Args:
        config_file: Python or saved YAML LazyConfig.
        overrides: "key=value" strings, as `apply_overrides` takes them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an override that changes nothing, see `apply_overrides`.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"There is no config file {config_file!r} (--config-file).")
    return apply_overrides(LazyConfig.load(config_file), overrides)


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Set config entries, refusing those that nothing reads.

    Entries of a part (a node with a `_target_`) may be new, since its constructor has the last
    word; everywhere else the key must exist.

    Args:
        cfg: changed in place.
        overrides: strings such as "model.assigner.topk=15".

    Returns:
        `cfg`.

    Raises:
        ValueError: for a string without "=", or a key that does not exist, listing those that do.
    """
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise ValueError(
                f"Override {override!r} has no '='; write key=value, e.g. train.max_iter=1000."
            )
        path = key.lstrip("+").split(".")
        node, where = cfg, "the config"
        for depth, name in enumerate(path):
            if OmegaConf.is_list(node):
                is_known = name.isdigit() and int(name) < len(node)
            else:
                is_known = isinstance(node, DictConfig) and name in node
            if not is_known:
                break
            node = node[int(name)] if OmegaConf.is_list(node) else node[name]
            where = ".".join(path[: depth + 1])
        if is_known or (isinstance(node, DictConfig) and "_target_" in node):
            continue
        known = sorted(node) if isinstance(node, DictConfig) else "no keys below it"
        raise ValueError(f"Unknown config key {key!r}; {where} has {known}.")
    return LazyConfig.apply_overrides(cfg, list(overrides))


def choose_data(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Put the user's own data into the config, or check the config's; take the classes from it.

    Args:
        cfg: changed in place: names of the data sets and `model.num_classes`.
        args: of a parser with `add_dataset_arguments`; `opts` tells whether `model.num_classes` is
            set explicitly.

    Raises:
        FileNotFoundError, ValueError: see `register_from_arguments`.
    """
    has_own = any(getattr(args, name, None) for name in ("train_json", "val_json"))
    # The first stage of a two-stage model does not know classes.
    key = "model.roi_heads.num_classes" if "roi_heads" in cfg.model else "model.num_classes"
    is_explicit = any(o.startswith(f"{key}=") for o in getattr(args, "opts", None) or [])
    num_classes = OmegaConf.select(cfg, key)
    data = register_from_arguments(
        args,
        cfg.dataloader.train.dataset.names,
        cfg.dataloader.test.dataset.names,
        num_classes if is_explicit or not has_own else None,
    )
    if has_own:
        cfg.dataloader.train.dataset.names = list(data.train)
        cfg.dataloader.test.dataset.names = list(data.val)
        if data.num_classes is not None:
            OmegaConf.update(cfg, key, data.num_classes)


def build_model(cfg: DictConfig) -> nn.Module:
    """The model of a LazyConfig on its device, the CPU where a GPU is asked for but missing."""
    device = str(cfg.train.device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("train.device is %r but there is no GPU: using the CPU.", device)
        device = "cpu"
    model = instantiate(cfg.model).to(device)
    if cfg.train.get("channels_last", False):
        model = model.to(memory_format=torch.channels_last)
    return model


def evaluate_lazy(cfg: DictConfig, model: nn.Module) -> Optional[Dict[str, Any]]:
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


def evaluate_lazy_with_tta(cfg: DictConfig, model: nn.Module) -> Optional[Dict[str, Any]]:
    """Evaluate with the test-time augmentation of `train.tta`: see `ATSSWithTTA`.

    Returns:
        As `evaluate_lazy`.
    """
    tta = OmegaConf.to_container(cfg.train.tta)
    scales = [tta.pop(key) for key in ("min_sizes", "max_size", "flip", "size_ranges")]
    tta.pop("enabled")
    base_size = tta.pop("base_size")
    views = release_views(scales[2], base_size) if scales[0] is None else make_views(*scales)
    return evaluate_lazy(cfg, ATSSWithTTA(model, views, **tta).eval())


def evaluate_checkpoint(cfg: DictConfig, resume: bool = False) -> Optional[Dict[str, Any]]:
    """Evaluate `train.init_checkpoint`, or the last checkpoint: what --eval-only does.

    The model is prepared as `train.prepare` says, and evaluated with test-time augmentation if
    `train.tta` says so.

    Args:
        cfg: the config.
        resume: take the last checkpoint of `train.output_dir`.

    Returns:
        As `evaluate_lazy`.

    Raises:
        FileNotFoundError, ValueError: see `load_to_evaluate`, `prepare_as_configured`.
    """
    model = build_model(cfg)
    checkpointer = ATSSCheckpointer(model, cfg.train.output_dir)
    load_to_evaluate(checkpointer, cfg.train.init_checkpoint, resume)
    # Configs saved by older versions have neither of the two keys.
    if "prepare" in cfg.train:
        model = prepare_as_configured(model, cfg.train.prepare)
    if "tta" in cfg.train and cfg.train.tta.enabled:
        return evaluate_lazy_with_tta(cfg, model)
    return evaluate_lazy(cfg, model)


def train_lazy(
    cfg: DictConfig, resume: bool = False, extra_hooks: Sequence[hooks.HookBase] = ()
) -> Optional[Dict[str, Any]]:
    """Train as a LazyConfig says, in this worker.

    Args:
        cfg: with `model`, `optimizer`, `lr_multiplier`, `dataloader` and `train`.
        resume: go on from the last checkpoint in `train.output_dir`.
        extra_hooks: registered before the writers, so that they see what these write.

    Returns:
        Results of the last evaluation on the main process, None if there was none.

    Raises:
        FileNotFoundError: nothing to resume, or the initial weights are missing.
        ValueError: initial weights that match no parameter.
        FloatingPointError: the loss became infinite or NaN.
    """
    model = build_model(cfg)
    logger.info("Model:\n%s", model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    cfg.optimizer.params.model = None
    # Look before long work: a missing folder to resume from should not cost the data's loading.
    checkpointer = ATSSCheckpointer(model, cfg.train.output_dir)
    if resume and not checkpointer.has_checkpoint():
        raise FileNotFoundError(
            f"--resume: there is no checkpoint in {cfg.train.output_dir!r} (train.output_dir)."
        )
    loader = instantiate(cfg.dataloader.train)

    if cfg.train.get("compile", False):
        compile_dense_parts(model)
    ddp_model = create_ddp_model(model, **cfg.train.ddp)
    device = next(model.parameters()).device
    dtype = autocast_dtype(cfg.train.amp.enabled, cfg.train.amp.get("precision", "float16"), device)
    trainer = StepTrainer(ddp_model, loader, optimizer, dtype)
    checkpointer = ATSSCheckpointer(ddp_model, cfg.train.output_dir, trainer=trainer)
    results: List[Optional[Dict[str, Any]]] = [None]

    def evaluate():
        results[0] = evaluate_lazy(cfg, ddp_model)
        return results[0]

    is_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            *extra_hooks,
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter),
                period=cfg.train.log_period,
            )
            if is_main
            else None,
        ]
    )
    load_or_resume(checkpointer, cfg.train.init_checkpoint, resume)
    # A checkpoint holds the iteration that was just finished.
    trainer.train(trainer.iter + 1 if resume else 0, cfg.train.max_iter)
    return results[0]
