"""Learning rate over time: 500 iterations of warm-up at a third, then divided by ten twice.

Values multiply the optimizer's learning rates; positions are fractions of the whole training.
"""

from fvcore.common.param_scheduler import MultiStepParamScheduler

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler


def _multi_step(max_iter, steps, warmup_iters=500):
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01], milestones=list(steps), num_updates=max_iter
        ),
        warmup_length=warmup_iters / max_iter,
        warmup_method="constant",
        warmup_factor=1.0 / 3,
    )


lr_multiplier_1x = _multi_step(90000, (60000, 80000))
lr_multiplier_2x = _multi_step(180000, (120000, 160000))
