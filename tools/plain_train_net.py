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
    CheckpointHook,
    RandomState,
    StopRequest,
    autocast_dtype,
    build_guard,
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
    record_step,
    run,
    set_up_run,
    share_step,
    training_parser,
    trim_metrics,
    update,
)

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
    guard = build_guard(cfg, dtype)
    loader = instantiate(cfg.dataloader.train)
    # All that a resumed run needs to go on as if it had not stopped.
    parts = {
        "data_loader": loader,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "grad_scaler": scaler,
        "guard": guard,
    }
    state = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
    checkpointer = make_checkpointer(cfg, model, **state)
    saving = CheckpointHook(
        checkpointer,
        **cfg.train.checkpointer,
        random_state=RandomState(cfg.train.seed),
        max_iter=max_iter,
    )
    checkpointer.add_checkpointable("saving", saving)
    start_iter = load_for_training(cfg, checkpointer, resume)

    if cfg.train.get("compile", False):
        compile_dense_parts(model)
    ddp_model = create_ddp_model(model, **cfg.train.ddp)
    ddp_model.train()
    is_main = comm.is_main_process()
    if is_main and start_iter > 0:
        trim_metrics(cfg.train.output_dir, start_iter)
    writers = default_writers(cfg.train.output_dir, max_iter) if is_main else []

    logger.info("Starting training from iteration %d", start_iter)
    saving.resume(start_iter)
    with EventStorage(start_iter) as storage, StopRequest() as stop:
        for iteration, data in zip(range(start_iter, max_iter), loader):
            storage.iter = iteration
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss_dict = ddp_model(data)
            losses = sum(loss_dict.values())

            optimizer.zero_grad()
            (losses if scaler is None else scaler.scale(losses)).backward()
            # The one wait of a step on a GPU: all processes learn the losses, whether one of them
            # is not finite, and whether a signal asked for a stop.
            report = share_step(loss_dict, is_stop_asked=stop.signal is not None)
            if not guard.must_skip(report, iteration, data, ddp_model):
                update(optimizer, scaler)
            record_step(storage, report, guard, scaler)
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()

            is_last = iteration + 1 == max_iter
            results = None
            if (cfg.train.eval_period and (iteration + 1) % cfg.train.eval_period == 0) or is_last:
                results = evaluate_lazy(cfg, ddp_model)
                ddp_model.train()
                if is_main and results:
                    for task, values in results.items():
                        scalars = {f"{task}/{name}": value for name, value in values.items()}
                        storage.put_scalars(**scalars, smoothing_hint=False)
                comm.synchronize()
            if is_last or (iteration + 1) % cfg.train.log_period == 0:
                for writer in writers:
                    writer.write()
            saving.step(iteration, results)
            if report.is_stop_asked and not is_last:
                saving.save_now(iteration)
                saving.finish()
                stop.exit()
    saving.finish()
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
