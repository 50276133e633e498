#!/usr/bin/env python
"""Train what a LazyConfig describes with a plain loop, to start your own from.

Does what `lazyconfig_train_net.py` does, without trainer and hooks: everything that happens in a
step is in `do_train`.

    python tools/plain_train_net.py --config-file configs/toy/atss_toy.py
    python tools/plain_train_net.py --config-file configs/coco/atss_R_50_FPN_1x.py --num-gpus 8
"""

import logging

import _quiet  # noqa: F401
import torch
from atss.device import compile_dense_parts
from atss.training import (
    autocast_dtype,
    build_model,
    build_optimizer,
    choose_data,
    create_ddp_model,
    evaluate_checkpoint,
    evaluate_lazy,
    load_for_training,
    load_lazy_config,
    make_checkpointer,
    make_grad_scaler,
    run,
    set_up_run,
    training_parser,
)
from fvcore.common.checkpoint import PeriodicCheckpointer

from detectron2.config import instantiate
from detectron2.engine import default_writers
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

logger = logging.getLogger("atss.plain_train_net")


def do_train(cfg, resume):
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    max_iter = cfg.train.max_iter
    scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), max_iter)

    device = next(model.parameters()).device
    dtype = autocast_dtype(cfg.train.amp.enabled, cfg.train.amp.precision, device)
    scaler = make_grad_scaler(dtype)
    state = {"optimizer": optimizer, "scheduler": scheduler}
    if scaler is not None:
        state["grad_scaler"] = scaler
    checkpointer = make_checkpointer(cfg, model, **state)
    start_iter = load_for_training(cfg, checkpointer, resume)

    if cfg.train.get("compile", False):
        compile_dense_parts(model)
    ddp_model = create_ddp_model(model, **cfg.train.ddp)
    ddp_model.train()
    is_main = comm.is_main_process()
    periodic_checkpointer = PeriodicCheckpointer(
        checkpointer, max_iter=max_iter, **cfg.train.checkpointer
    )
    writers = default_writers(cfg.train.output_dir, max_iter) if is_main else []

    loader = instantiate(cfg.dataloader.train)
    logger.info("Starting training from iteration %d", start_iter)
    with EventStorage(start_iter) as storage:
        for data, iteration in zip(loader, range(start_iter, max_iter)):
            storage.iter = iteration
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss_dict = ddp_model(data)
            losses = sum(loss_dict.values())

            optimizer.zero_grad()
            if scaler is None:
                losses.backward()
                optimizer.step()
            else:
                scaler.scale(losses).backward()
                scaler.step(optimizer)
                scaler.update()

            # Reading a loss waits for the GPU, so it is done only when somebody looks, and before
            # weights are saved: those of a loss that is not finite must not be.
            is_last = iteration + 1 == max_iter
            is_logged = (iteration + 1) % cfg.train.log_period == 0 or is_last
            if is_logged or (iteration + 1) % cfg.train.checkpointer.period == 0:
                reduced = {k: v.item() for k, v in comm.reduce_dict(loss_dict).items()}
                if is_main:
                    if not all(torch.isfinite(torch.tensor(v)) for v in reduced.values()):
                        raise FloatingPointError(f"Loss at iteration {iteration}: {reduced}")
                    storage.put_scalars(total_loss=sum(reduced.values()), **reduced)
                    storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()

            if (cfg.train.eval_period and (iteration + 1) % cfg.train.eval_period == 0) or is_last:
                results = evaluate_lazy(cfg, ddp_model)
                ddp_model.train()
                if is_main and results:
                    for task, values in results.items():
                        scalars = {f"{task}/{name}": value for name, value in values.items()}
                        storage.put_scalars(**scalars, smoothing_hint=False)
                comm.synchronize()
            if is_main:
                if is_logged:
                    for writer in writers:
                        writer.write()
                periodic_checkpointer.step(iteration)
    for writer in writers:
        writer.close()


def main(args):
    cfg = load_lazy_config(args.config_file, args.opts)
    choose_data(cfg, args)
    set_up_run(cfg, args)
    if args.eval_only:
        return evaluate_checkpoint(cfg, args.resume)
    return do_train(cfg, args.resume)


if __name__ == "__main__":
    run(main, training_parser(__doc__).parse_args(), load_lazy_config)
