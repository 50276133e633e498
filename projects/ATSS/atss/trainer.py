"""Trainer of a YAML config: Detectron2's DefaultTrainer with our parts."""

import os
import weakref
from functools import partial
from typing import Any, Dict, List, Optional

import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import PreciseBN
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm

from .checks import check_choice
from .data import NamingMapper, build_train_loader, load_dataset_dicts
from .data.loader import SAMPLERS
from .evaluation import build_evaluator
from .training import build_model, evaluate_checkpoint, load_for_training, make_checkpointer
from .training.evaluation import Results, evaluate_with_tta
from .training.optimizer import get_optimizer_params
from .training.runs import build_hooks, build_step_trainer
from .training.settings import get_setting

_OPTIMIZERS = ("SGD", "AdamW")


class Trainer(DefaultTrainer):
    """Detectron2's default training logic, on CPU and GPU, with the paper's recipe.

    What differs from `DefaultTrainer`: parameter groups (`get_optimizer_params`), COCO evaluation,
    mixed precision that does not need CUDA, ground truth checked before the first step, and
    checkpoints that must fit the model. The config needs `add_atss_config`'s keys.

    Raises:
        FileNotFoundError, ValueError: for data or settings that cannot work, before training.
    """

    def __init__(self, cfg: CfgNode):
        # Not DefaultTrainer's: up to Detectron2 0.6 it demands CUDA for AMP and several workers.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)

        self._trainer = build_step_trainer(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = make_checkpointer(cfg, self._trainer.model, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> List[Optional[HookBase]]:
        """Those of every run, and precise batch norm (TEST.PRECISE_BN) before a checkpoint."""

        def evaluate() -> Results:
            self._last_eval_results = self.test(self.cfg, self.model)
            return self._last_eval_results

        precise = []
        if self.cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            cfg = self.cfg.clone()
            cfg.defrost()
            cfg.DATALOADER.NUM_WORKERS = 0  # it has a loader of its own
            loader, num_iters = self.build_train_loader(cfg), cfg.TEST.PRECISE_BN.NUM_ITER
            precise.append(PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, num_iters))
        return build_hooks(
            self.cfg,
            self._trainer,
            self.checkpointer,
            self.scheduler,
            evaluate,
            self.build_writers,
            precise,
        )

    def train(self) -> Optional[Results]:
        """Train to the end, or to the end of a step in which a signal asks for a stop."""
        with self._trainer.stop:
            return super().train()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model of the config, in its memory format and on its device."""
        return build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD or AdamW over the paper's parameter groups.

        Raises:
            ValueError: for another SOLVER.OPTIMIZER.
        """
        solver = cfg.SOLVER
        check_choice("Trainer", "optimizer", solver.OPTIMIZER, _OPTIMIZERS, "SOLVER.OPTIMIZER")
        decay_bias = solver.WEIGHT_DECAY_BIAS
        groups = get_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY if decay_bias is None else decay_bias,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        )
        options: Dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
        if solver.OPTIMIZER == "SGD":
            options.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
        optimizer = getattr(torch.optim, solver.OPTIMIZER)
        return maybe_add_gradient_clipping(cfg, optimizer)(groups, **options)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """Loader over checked ground truth; Detectron2's for samplers that only it has."""
        dataset = load_dataset_dicts(
            cfg.DATASETS.TRAIN,
            get_setting(cfg, "num_classes"),
            cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            cfg.MODEL.MASK_ON,
        )
        mapper, loading = NamingMapper(cfg, True), cfg.DATALOADER
        if loading.SAMPLER_TRAIN not in SAMPLERS:
            return build_detection_train_loader(cfg, dataset=dataset, mapper=mapper)
        return build_train_loader(
            dataset,
            mapper,
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_workers=loading.NUM_WORKERS,
            aspect_ratio_grouping=loading.ASPECT_RATIO_GROUPING,
            sampler=loading.SAMPLER_TRAIN,
            repeat_threshold=loading.REPEAT_THRESHOLD,
            repeat_sqrt=loading.REPEAT_SQRT,
            subset_ratio=loading.RANDOM_SUBSET_RATIO,
            seed=cfg.SEED,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Detectron2's loader; a file that cannot be read is named."""
        mapper = NamingMapper(cfg, False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """That of the set, for boxes, and for masks where the model has them."""
        tasks: List[str] = ["bbox"] + (["segm"] if cfg.MODEL.MASK_ON else [])
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            tasks = ["box_proposals"]
        return build_evaluator([dataset_name], tasks, os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def evaluate_checkpoint(cls, cfg: CfgNode, resume: bool = False) -> Dict[str, Any]:
        """What --eval-only does: see `atss.training.evaluate_checkpoint`."""
        return evaluate_checkpoint(cfg, resume, cls.build_model, cls.test, cls.test_with_tta)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> Dict[str, Any]:
        """`test` with the test-time augmentation of TEST.AUG; names of results end in "_TTA"."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [build_evaluator([name], output_dir=folder) for name in cfg.DATASETS.TEST]
        return evaluate_with_tta(cfg, model, partial(cls.test, evaluators=evaluators))

    def resume_or_load(self, resume: bool = True) -> None:
        """Start from MODEL.WEIGHTS, or continue from the last checkpoint of OUTPUT_DIR.

        Raises:
            FileNotFoundError, ValueError: see `load_for_training`.
        """
        self.start_iter = load_for_training(self.cfg, self.checkpointer, resume)

    def state_dict(self) -> Dict[str, Any]:
        state = TrainerBase.state_dict(self)
        state["_trainer"] = self._trainer.state_dict()
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
