#!/usr/bin/env python
"""Train or evaluate what a YAML config describes, with `atss.trainer.Trainer`.

    python tools/train_net.py --config-file configs/coco/atss_R_50_FPN_1x.yaml --num-gpus 8
    python tools/train_net.py --config-file configs/toy/atss_toy.yaml SOLVER.MAX_ITER 200
    python tools/train_net.py --config-file configs/coco/atss_R_50_FPN_1x.yaml --eval-only \
        MODEL.WEIGHTS output/atss_R_50_FPN_1x/model_final.pth
"""

import _quiet  # noqa: F401
from atss.trainer import Trainer
from atss.training import choose_data, load_yaml_config, run, set_up_run, training_parser


def main(args):
    cfg = load_yaml_config(args.config_file, args.opts)
    choose_data(cfg, args)
    cfg.freeze()
    set_up_run(cfg, args)
    if args.eval_only:
        return Trainer.evaluate_checkpoint(cfg, args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    results = trainer.train()
    if cfg.TEST.AUG.ENABLED:
        results = {**(results or {}), **Trainer.test_with_tta(cfg, trainer.model)}
    return results


if __name__ == "__main__":
    run(main, training_parser(__doc__).parse_args(), load_yaml_config)
