"""Metadata of an exported file: what its user has to know, as JSON beside it."""

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

import atss

from ..backbone import padding_rule
from ..data.toy_shapes import ToyShapesOptions
from .modules import ImageSize, PathLike, output_names

Config = Union[DictConfig, CfgNode]


def collect_metadata(
    model: nn.Module,
    file: PathLike,
    export_format: str,
    batch_size: int = 1,
    stage: str = "detections",
    fixed_size: Optional[ImageSize] = None,
    resize: Optional[Dict[str, Any]] = None,
    class_names: Optional[Sequence[str]] = None,
    opset: Optional[int] = None,
) -> Dict[str, Any]:
    """Everything around the file that is not in it.

    Args:
        model, batch_size, stage: see `export_torchscript`.
        file: the exported file; only its name is kept.
        export_format: key of `FORMATS`.
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
        "content": stage,
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
        "size_divisibility": padding_rule(model.backbone)[0],
        "done_inside": ["normalization by mean and std", "padding to size_divisibility"]
        + ["decoding"] * (stage != "features")
        + ["NMS"] * (stage == "detections"),
        "outputs": _outputs(model, batch_size, stage, num_classes),
        "strides": [int(stride) for stride in core.anchor_generator.strides],
        "anchors_per_location": int(core.anchor_generator.num_anchors[0]),
        "anchors_per_level": None if fixed_size is None else _anchors_per_level(model, fixed_size),
        "num_classes": num_classes,
        "class_names": None if class_names is None else list(class_names),
        "score": _two_stage_score(model) if is_two_stage else _score(core),
        "versions": {
            "atss": atss.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "detectron2": detectron2.__version__,
            "python": platform.python_version(),
            **({} if opset is None else {"onnx_opset": opset}),
        },
    }


def write_metadata(metadata: Dict[str, Any], file: PathLike) -> Path:
    """Write metadata beside an exported file: model.onnx.json for model.onnx.

    Returns:
        Path of the JSON file.
    """
    path = Path(f"{os.fspath(file)}.json")
    path.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
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


def _outputs(model: nn.Module, batch_size: int, stage: str, num_classes: int) -> List[Dict]:
    """Name, shape, dtype and meaning of each output."""
    feature = ([batch_size, "channels", "rows", "columns"], "float32", "map of the backbone")
    corners = "x1, y1, x2, y2 in pixels of the input image"
    probability = "probability that a pixel belongs to the object, on a grid over its box"
    known = {
        "boxes": ([stage, 4], "float32", corners),
        "scores": ([stage], "float32", "falling within each image"),
        "classes": ([stage], "int64", "index into class_names"),
        "image_idxs": ([stage], "int64", "which image of the batch"),
        "masks": ([stage, 1, "side", "side"], "float32", probability),
    }
    if stage == "raw heads":
        shape = [batch_size, "anchors"]
        known = {
            "logits": ([*shape, num_classes], "float32", "class logits, a sigmoid each"),
            "boxes": ([*shape, 4], "float32", f"{corners}, not clipped to it"),
            "centerness": (shape, "float32", "logits"),
        }
    keys = ("name", "shape", "dtype", "meaning")
    names = output_names(model, batch_size, stage)
    return [dict(zip(keys, (name, *known.get(name, feature)))) for name in names]


def _anchors_per_level(model: nn.Module, size: ImageSize) -> List[int]:
    divisor, _ = padding_rule(model.backbone)
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
