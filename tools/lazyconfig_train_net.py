#!/usr/bin/env python
"""Train or evaluate what a LazyConfig describes.

    python tools/lazyconfig_train_net.py --config-file configs/coco/atss_R_50_FPN_1x.py --num-gpus 8
    python tools/lazyconfig_train_net.py --config-file configs/toy/atss_toy.py train.max_iter=200
    python tools/lazyconfig_train_net.py --config-file configs/coco/atss_R_50_FPN_1x.py \
        --train-json train.json --train-images train/ --val-json val.json --val-images val/
"""

import _quiet  # noqa: F401
from atss.training import (
    choose_data,
    evaluate_checkpoint,
    load_lazy_config,
    run,
    set_up_run,
    train_lazy,
    training_parser,
)


def main(args):
    cfg = load_lazy_config(args.config_file, args.opts)
    choose_data(cfg, args)
    set_up_run(cfg, args)
    if args.eval_only:
        return evaluate_checkpoint(cfg, args.resume)
    return train_lazy(cfg, resume=args.resume)


if __name__ == "__main__":
    run(main, training_parser(__doc__).parse_args(), load_lazy_config)
