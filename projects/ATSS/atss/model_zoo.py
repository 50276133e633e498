"""Configs by name, and the models and published weights that belong to them."""

import os
from pathlib import Path
from typing import List, Optional

import torch
from omegaconf import DictConfig
from torch import nn

from detectron2.config import LazyConfig, instantiate

from .checkpoint import (
    OVERRIDES_KEY,
    ATSSCheckpointer,
    convert_checkpoint,
    fetch,
    load_or_resume,
    override_weights,
    read_checkpoint,
    write_checkpoint,
)

_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/atss/"

# Published weights by config; file names end with the first digits of their sha256.
_URLS = {
    "coco/atss_R_50_FPN_1x": _MMDET
    + "atss_r50_fpn_1x_coco/atss_r50_fpn_1x_coco_20200209-985f7bd0.pth",
    "coco/atss_R_101_FPN_1x": _MMDET
    + "atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth",
}


def _config_root() -> Path:
    """Folder of the configs: inside the package in a wheel, at the top of a checkout."""
    package = Path(__file__).resolve().parent
    for root in (package / "configs", package.parents[2] / "configs"):
        if (root / "common").is_dir():
            return root
    raise FileNotFoundError(
        f"The configs of atss are neither in {package / 'configs'} nor in "
        f"{package.parents[2] / 'configs'}; install the package again."
    )


def list_configs() -> List[str]:
    """Names that `get_config` takes, with their folder: "coco/atss_R_50_FPN_1x"."""
    root = _config_root()
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        str(path.with_suffix("")).replace(os.sep, "/")
        for path in files
        if path.parts[0] != "common"
    )


def config_file(name: str) -> str:
    """Path of the LazyConfig of a name.

    Args:
        name: such as "toy/atss_toy", or "atss_R_50_FPN_1x" (looked up in coco, then everywhere).

    Raises:
        ValueError: if there is none, or several folders have one; the message lists the names.
    """
    name = name[:-3] if name.endswith(".py") else name
    known = list_configs()
    found = [k for k in (name, f"coco/{name}") if k in known]
    found = found or [k for k in known if k.endswith(f"/{name}")]
    if len(found) != 1 and not (found and found[0] in (name, f"coco/{name}")):
        what = f"Several configs are called {name!r}" if found else f"Unknown config {name!r}"
        raise ValueError(f"{what}; there are {found or known}.")
    return str(_config_root() / f"{found[0]}.py")


def get_config(name: str) -> DictConfig:
    """LazyConfig of a name; `get_config(name).model` describes the model.

    Args:
        name: see `config_file`.

    Raises:
        ValueError: see `config_file`.
    """
    return LazyConfig.load(config_file(name))


def get(name: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """Model of a name, ready to detect.

    Args:
        name: see `config_file`.
        trained: load published weights, if there are any for this name; else weights are random.
        device: such as "cpu"; by default the first GPU, or the CPU where there is none.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: for an unknown name or one without published weights; if the weights cannot be
            downloaded or do not match their hash.
    """
    cfg = get_config(name)
    url = get_checkpoint_url(name) if trained else None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = instantiate(cfg.model).to(device).eval()
    if url:
        load_or_resume(ATSSCheckpointer(model), _converted(url), resume=False)
    return model


def _converted(url: str) -> str:
    """Local file of published weights in our names, downloaded, checked and converted once."""
    path = fetch(url)
    converted_path = f"{os.path.splitext(path)[0]}.atss.pth"
    is_new = os.path.isfile(converted_path) and (
        os.path.getmtime(converted_path) >= os.path.getmtime(path)
    )
    if not is_new:
        converted = convert_checkpoint(read_checkpoint(path))
        weights = override_weights(converted.state_dict, converted.overrides)
        content = {"model": weights, OVERRIDES_KEY: converted.overrides}
        try:
            write_checkpoint(content, converted_path)
        except OSError:
            return path  # the cache cannot be written to: convert while loading
    return converted_path


def get_checkpoint_url(name: str) -> str:
    """Address of the published weights of a name.

    Raises:
        ValueError: for an unknown name, or one whose weights have no direct address.
    """
    path = Path(config_file(name)).relative_to(_config_root())
    url = _URLS.get(str(path.with_suffix("")).replace(os.sep, "/"))
    if url:
        return url
    raise ValueError(
        f"There are no weights of {name!r} at a direct address. The authors publish theirs at "
        "https://github.com/sfzhang15/ATSS#models; train the model, or load your file."
    )
