#!/usr/bin/env python
"""Train or evaluate what a LazyConfig describes.

    python tools/lazyconfig_train_net.py --config-file configs/coco/atss_R_50_FPN_1x.py --num-gpus 8
    python tools/lazyconfig_train_net.py --config-file configs/toy/atss_toy.py train.max_iter=200
    python tools/lazyconfig_train_net.py --config-file configs/coco/atss_R_50_FPN_1x.py \
        --train-json train.json --train-images train/ --val-json val.json --val-images val/
"""

from atss.checkpointer import ATSSCheckpointer, load_or_resume
from atss.command_line import run, training_parser
from atss.lazy_training import (
    build_model,
    choose_data,
    evaluate_lazy,
    evaluate_lazy_with_tta,
    load_lazy_config,
    train_lazy,
)
from atss.training_loop import create_ddp_model

from detectron2.engine import default_setup


def main(args):
    cfg = load_lazy_config(args.config_file, args.opts)
    choose_data(cfg, args)
    default_setup(cfg, args)
    if not args.eval_only:
        return train_lazy(cfg, resume=args.resume)
    model = build_model(cfg)
    checkpointer = ATSSCheckpointer(model, cfg.train.output_dir)
    load_or_resume(checkpointer, cfg.train.init_checkpoint, args.resume)
    model = create_ddp_model(model)
    if "tta" in cfg.train and cfg.train.tta.enabled:
        return evaluate_lazy_with_tta(cfg, model)
    return evaluate_lazy(cfg, model)


if __name__ == "__main__":
    run(main, training_parser(__doc__).parse_args())
