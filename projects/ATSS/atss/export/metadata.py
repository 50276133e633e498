"""What does a user of an exported file have to know? The contents of model.json beside it."""

import json
import os
import platform
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import torch
import torchvision
from omegaconf import DictConfig
from torch import nn

import detectron2
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN

from ..data.toy_shapes import ToyShapesOptions
from .modules import PathLike, Size, output_names

__all__ = ["class_names_of", "describe", "resize_rule", "write_metadata"]

Config = Union[DictConfig, CfgNode]

_MEANING = {
    "boxes": (["detections", 4], "float32", "x1, y1, x2, y2 in pixels of the input image"),
    "scores": (["detections"], "float32", "falling within each image"),
    "classes": (["detections"], "int64", "index into class_names"),
    "image_idxs": (["detections"], "int64", "which image of the batch"),
    "masks": (
        ["detections", 1, "side", "side"],
        "float32",
        "probability that a pixel belongs to the object, on a grid over its box",
    ),
}


def describe(
    model: nn.Module,
    file: PathLike,
    export_format: str,
    batch_size: int = 1,
    raw_heads: bool = False,
    fixed_size: Optional[Size] = None,
    resize: Optional[Dict[str, Any]] = None,
    class_names: Optional[Sequence[str]] = None,
    opset: Optional[int] = None,
) -> Dict[str, Any]:
    """Everything around the file that is not in it.

    Args:
        model: what was exported.
        file: the exported file; only its name is kept.
        export_format: "torchscript", "export" or "onnx".
        batch_size: N of the file.
        raw_heads: whether the file holds `RawHeads`.
        fixed_size: (height, width) that the file insists on, if it does.
        resize: see `resize_rule`.
        class_names: K names, if known.
        opset: of an ONNX file.

    Returns:
        A dict that JSON can hold.

    Raises:
        ValueError: if there are not as many names as classes.
    """
    core = model.proposal_generator
    is_two_stage = isinstance(model, GeneralizedRCNN)
    num_classes = int(model.roi_heads.num_classes if is_two_stage else core.num_classes)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(
            f"There are {len(class_names)} class names, but the model has {num_classes} classes. "
            "Give as many with --class-names, in the order of the classes in training."
        )
    return {
        "file": os.path.basename(os.fspath(file)),
        "format": export_format,
        "content": "raw heads" if raw_heads else "detections",
        "input": {
            "name": "images",
            "shape": [batch_size, 3, *(fixed_size or ("height", "width"))],
            "dtype": "float32",
            "range": [0, 255],
        },
        "channel_order": model.input_format,
        "resize": resize,
        "mean": model.pixel_mean.flatten().tolist(),
        "std": model.pixel_std.flatten().tolist(),
        "size_divisibility": max(model.backbone.size_divisibility, 1),
        "done_inside": ["normalization by mean and std", "padding to size_divisibility"]
        + ([] if raw_heads else ["decoding", "NMS"]),
        "outputs": _outputs(model, batch_size, raw_heads, num_classes),
        "strides": [int(stride) for stride in core.anchor_generator.strides],
        "anchors_per_location": int(core.anchor_generator.num_anchors[0]),
        "anchors_per_level": None if fixed_size is None else _anchors_per_level(model, fixed_size),
        "num_classes": num_classes,
        "class_names": None if class_names is None else list(class_names),
        "score": _two_stage_score(model) if is_two_stage else _score(core),
        "versions": {
            "atss": _own_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "detectron2": detectron2.__version__,
            "python": platform.python_version(),
            **({} if opset is None else {"onnx_opset": opset}),
        },
    }


def write_metadata(description: Dict[str, Any], file: PathLike) -> Path:
    """Write model.json into the folder of an exported file.

    Returns:
        Path of model.json.
    """
    path = Path(file).with_name("model.json")
    path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return path


def resize_rule(cfg: Config) -> Optional[Dict[str, Any]]:
    """How the config resizes images before the detector, or None if it has no shortest-edge rule.

    Args:
        cfg: LazyConfig or yacs config.
    """
    if isinstance(cfg, CfgNode):
        short, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    else:
        mapper = cfg.get("dataloader", {}).get("test", {}).get("mapper", {})
        rules = [a for a in mapper.get("augmentations", []) if "short_edge_length" in a]
        if not rules:
            return None
        short, longest = rules[0].short_edge_length, rules[0].get("max_size", None)
    short = max(short) if isinstance(short, (list, tuple)) else short
    if not short:
        return None
    return {
        "short_edge": int(short),
        "long_edge_at_most": None if longest is None else int(longest),
        "interpolation": "bilinear",
        "keep_aspect_ratio": True,
    }


def class_names_of(cfg: Config, num_classes: int) -> Optional[List[str]]:
    """Names of the classes of the config's data set, or None where they are not known.

    Args:
        cfg: LazyConfig or yacs config.
        num_classes: K of the model; names of another number are not its.
    """
    if isinstance(cfg, CfgNode):
        names = list(cfg.DATASETS.TEST)
    else:
        dataset = cfg.get("dataloader", {}).get("test", {}).get("dataset", {})
        names = list(dataset.get("names", []))
    for name in names:
        # The embedded set has its names before it is rendered.
        toy_names = ToyShapesOptions().class_names if name.startswith("toy_shapes_") else None
        found = toy_names or MetadataCatalog.get(name).get("thing_classes", None)
        if found is not None and len(found) == num_classes:
            return list(found)
    return None


def _outputs(model: nn.Module, batch_size: int, raw_heads: bool, num_classes: int) -> List[Dict]:
    meaning = _MEANING
    if raw_heads:
        meaning = {
            "logits": (
                [batch_size, "anchors", num_classes],
                "float32",
                "class logits, a sigmoid each",
            ),
            "boxes": (
                [batch_size, "anchors", 4],
                "float32",
                "x1, y1, x2, y2 in pixels of the input image, not clipped to it",
            ),
            "centerness": ([batch_size, "anchors"], "float32", "logits"),
        }
    return [
        dict(zip(("name", "shape", "dtype", "meaning"), (name, *meaning[name])))
        for name in output_names(model, batch_size, raw_heads)
    ]


def _anchors_per_level(model: nn.Module, size: Size) -> List[int]:
    divisor = max(model.backbone.size_divisibility, 1)
    height, width = (-(-side // divisor) * divisor for side in size)
    generator = model.proposal_generator.anchor_generator
    return [
        -(-height // int(stride)) * -(-width // int(stride)) * num_anchors
        for stride, num_anchors in zip(generator.strides, generator.num_anchors)
    ]


def _score(core: nn.Module) -> Dict[str, Any]:
    formula = "sigmoid(logit)"
    if core.head.centerness is not None:
        formula += " * sigmoid(centerness)"
        formula = f"sqrt({formula})" if core.selector.sqrt_score else formula
    return {
        "formula": formula,
        "threshold": core.selector.score_thresh,
        "threshold_is_for": "sigmoid(logit)",
        "candidates_per_level": core.selector.topk_candidates,
        "nms_iou": core.selector.nms_thresh,
        "nms_is": "per class, over all levels",
        "detections_per_image": core.selector.detections_per_image,
    }


def _two_stage_score(model: nn.Module) -> Dict[str, Any]:
    predictor = model.roi_heads.box_predictor
    predictor = predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor
    return {
        "formula": "softmax over the classes and background",
        "threshold": predictor.test_score_thresh,
        "threshold_is_for": "score",
        "nms_iou": predictor.test_nms_thresh,
        "nms_is": "per class",
        "detections_per_image": predictor.test_topk_per_image,
    }


def _own_version() -> str:
    from .. import __version__  # not at import time, when the package is still being made

    return __version__
