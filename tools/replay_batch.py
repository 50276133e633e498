#!/usr/bin/env python
"""Run the batch again whose loss was not finite, and say where that starts.

A run that stops at such a loss writes the batch and the weights before the update; its message
names the file.

    python tools/replay_batch.py output/demo/nonfinite_0000123_rank0.pth --config-file output/demo
"""

import os

import _quiet  # noqa: F401
import torch
from atss.checkpoint import read_checkpoint
from atss.training import build_model, find_config, load_config, run_here, tool_parser
from atss.training.nonfinite import load_batch

from detectron2.utils.events import EventStorage


def watch(model, found):
    """Note, in the order of computing, modules without parts whose output is not finite."""

    def note(name):
        def hook(module, inputs, output):
            tensors = [output] if isinstance(output, torch.Tensor) else []
            if any(not torch.isfinite(tensor).all() for tensor in tensors):
                found.append(name)

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(note(name))


def main(args):
    content = read_checkpoint(args.file)
    if "batch" not in content:
        raise ValueError(f"{args.file} holds no batch; name a file nonfinite_*.pth of a run.")
    cfg = load_config(args.config_file or find_config(os.path.dirname(args.file) or "."))
    model = build_model(cfg)
    model.load_state_dict(content["model"])
    model.train()
    batch = load_batch(content)
    dtype = content["dtype"] and getattr(torch, content["dtype"].rpartition(".")[2])
    print(f"Iteration {content['iteration']}, not finite: {', '.join(content['failed'])}")
    for inputs in batch:
        size = tuple(inputs["image"].shape[1:])
        objects = len(inputs["instances"])
        print(f"  {inputs.get('file_name', 'no file')}: {size[0]}x{size[1]} px, {objects} objects")

    modules = []
    watch(model, modules)
    device = next(model.parameters()).device.type
    with EventStorage(content["iteration"]), torch.autocast(device, dtype, enabled=bool(dtype)):
        losses = model(batch)
    for name, loss in losses.items():
        print(f"{name:<20} {loss.item():.6g}")
    print(f"First module with an output that is not finite: {modules[0] if modules else 'none'}")
    total = sum(losses.values())
    if not torch.isfinite(total):
        return
    total.backward()
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    print(f"Gradients that are not finite: {', '.join(names[:5]) or 'none'}")
    print("The loss is finite here: it depends on the device, or on random numbers.")


def parse_args():
    parser = tool_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="nonfinite_*.pth in the folder of a run")
    parser.add_argument(
        "--config-file", metavar="FILE", help="config of the run; by default that beside FILE"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_here(main, parse_args())
