"""Evaluation of a run: in training, of a checkpoint, and with test-time augmentation."""

import logging
from typing import Any, Callable, Dict, Optional

from omegaconf import DictConfig, OmegaConf
from torch import nn

from detectron2.config import CfgNode, instantiate
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm

from ..checkpoint import ATSSCheckpointer, load_or_resume
from ..data import common_classes
from ..inference_mode import prepare_as_configured
from ..tta import ATSSWithTTA, make_views, release_views
from .models import build_model
from .settings import Config, data_class_names, get_setting

logger = logging.getLogger(__name__)

Results = Dict[str, Any]


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
        evaluate, evaluate_tta: take `cfg` and the model; both their results are returned.

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
