"""Do these weights belong to this model? Detectron2's checkpointer, which says so.

It also reads the weights of the authors, of mmdetection and of torchvision's ResNets as they are,
and nothing that runs code.
"""

import logging
from typing import Any, Dict

from torch import Tensor

from detectron2.checkpoint import DetectionCheckpointer

from . import (
    CheckpointError,
    apply_overrides,
    check_pickle,
    convert_checkpoint,
    detect_source,
    fetch,
    num_classes_of,
    read_checkpoint,
)

__all__ = ["ATSSCheckpointer", "load_or_resume", "load_to_evaluate"]

logger = logging.getLogger(__name__)

_OVERRIDES = "atss_overrides"


class ATSSCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that weights that match nothing are an error.

    Detectron2 logs a warning and trains from random weights, which shows days later.

    Weights of another code base are recognised and converted while loading, and the model gets the
    geometry they were trained with, each change in the log; checkpoints saved later remember it.
    Files are read without running code of theirs (`atss.checkpoint.read_checkpoint`); zoo files at
    `detectron2://` and `catalog://` go to Detectron2's own loader unchecked.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._is_zoo = False
        self._overrides: Dict[str, Any] = {}

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """See `DetectionCheckpointer.load`.

        Raises:
            CheckpointError: a `ValueError`, for a file that cannot be had, is truncated, needs to
                run code, or holds weights of another architecture or number of classes.
        """
        self._is_zoo = str(path).startswith(("detectron2://", "catalog://"))
        if str(path).startswith(("http://", "https://")):
            path = fetch(path)
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set after an error

    def save(self, name: str, **kwargs: Any) -> None:
        """See `DetectionCheckpointer.save`; adds the geometry of converted weights."""
        if self._overrides:
            kwargs.setdefault(_OVERRIDES, self._overrides)
        super().save(name, **kwargs)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if filename.endswith(".pkl"):
            if not self._is_zoo:
                check_pickle(filename)
            return super()._load_file(filename)
        content = read_checkpoint(filename)
        if filename.endswith(".pyth"):
            return super()._load_file(filename)
        source = detect_source(content)
        if source not in (None, "atss"):
            return self._convert(content, source, filename)
        if "model" not in content:
            content = {"model": content}
        # Main's way to ask for matching by heuristics; 0.5 has none.
        url = getattr(self, "_parsed_url_during_load", None)
        if url is not None and "matching_heuristics=True" in url.query:
            content["matching_heuristics"] = True
        return content

    def _convert(self, content: Dict[str, Any], source: str, filename: str) -> Dict[str, Any]:
        converted = convert_checkpoint(content, source)
        logger.info(
            "%s holds weights of another code base (%s): %d names converted, %d dropped.",
            filename,
            source,
            len(converted.state_dict),
            len(converted.dropped),
        )
        _check_fit(self.model.state_dict(), converted.state_dict, filename)
        return {"model": converted.state_dict, _OVERRIDES: converted.overrides}

    def _load_model(self, checkpoint: Any):
        overrides = checkpoint.pop(_OVERRIDES, None)
        if overrides:
            weights = checkpoint["model"] = dict(checkpoint["model"])
            self._overrides, changes = apply_overrides(self.model, overrides, weights)
            for change in changes:
                logger.info("Geometry of the weights: %s", change)
        incompatible = super()._load_model(checkpoint)
        if incompatible is None:
            return incompatible
        names = set(self.model.state_dict())
        wrong_shape = {entry[0] for entry in incompatible.incorrect_shapes}
        if not names - set(incompatible.missing_keys) - wrong_shape:
            found = list(checkpoint.get("model", {}))[:3]
            raise ValueError(
                "The weights match no parameter of the model: they have names such as "
                f"{found + list(incompatible.unexpected_keys)[:3]}, the model needs names such as "
                f"{sorted(names)[:3]}. Check train.init_checkpoint (MODEL.WEIGHTS)."
            )
        return incompatible


def _check_fit(model: Dict[str, Tensor], weights: Dict[str, Tensor], filename: str) -> None:
    """Refuse converted weights that would load only in part; adapt tower biases to the model."""
    for name in [name for name in weights if name not in model and "_tower." in name]:
        # A model with conv_bias=False takes mmdetection's weights without the zeros added to them.
        is_bias = name.endswith(".bias") and name[: -len("bias")] + "weight" in model
        if is_bias and not weights[name].any():
            del weights[name]
    found, needed = num_classes_of(weights), num_classes_of(model)
    if found is not None and needed is not None and found != needed:
        raise CheckpointError(
            f"{filename!r} knows {found} classes, the model {needed}. Set model.num_classes "
            f"(MODEL.ATSS.NUM_CLASSES) to {found}, or give the weights a new class predictor: "
            f"tools/convert_checkpoint.py IN OUT --num-classes {needed}."
        )
    missing = [n for n in model if n not in weights and (found is not None or "bottom_up" in n)]
    missing = [n for n in missing if not n.startswith("pixel_")]
    extra = [name for name in weights if name not in model]
    shapes = [n for n in weights if n in model and weights[n].shape != model[n].shape]
    for names, what in (
        (extra, "which the model lacks"),
        (shapes, "of another shape than the model's"),
        (missing, "missing, which the model needs"),
    ):
        if names:
            raise CheckpointError(
                f"{filename!r} holds weights of another architecture: {len(names)} parameters "
                f"such as {names[0]!r} {what}. Choose the config of these weights (depth, groups, "
                "deformable stages)."
            )


def load_or_resume(checkpointer: ATSSCheckpointer, weights: str, resume: bool) -> None:
    """Load the initial weights, or everything of the last checkpoint.

    Args:
        checkpointer: of the model and, to resume, the trainer.
        weights: path or URL of the initial weights; "" for none.
        resume: whether to go on from the last checkpoint of the checkpointer's folder.

    Raises:
        FileNotFoundError: nothing to resume, or no such weights.
        ValueError: weights that cannot be used, or match no parameter.
    """
    if resume and not checkpointer.has_checkpoint():
        raise FileNotFoundError(
            f"--resume: there is no checkpoint in {checkpointer.save_dir!r}. Start without "
            "--resume, or give the output folder of the run to go on with."
        )
    try:
        checkpointer.resume_or_load(weights, resume=resume)
    except AssertionError as error:  # fvcore's way to say that a file is missing
        raise FileNotFoundError(
            f"Weights {weights!r} cannot be loaded ({error}). Check train.init_checkpoint "
            "(MODEL.WEIGHTS)."
        ) from error


def load_to_evaluate(checkpointer: ATSSCheckpointer, weights: str, resume: bool) -> None:
    """Load what is to be evaluated; without weights there is nothing to evaluate.

    Args:
        checkpointer, weights, resume: see `load_or_resume`.

    Raises:
        FileNotFoundError, ValueError: see `load_or_resume`; also for no weights at all.
    """
    if not weights and not resume:
        raise ValueError(
            "--eval-only has no weights, and would evaluate random ones. Name a checkpoint in "
            "train.init_checkpoint (MODEL.WEIGHTS), or add --resume for the last one of the output "
            "folder."
        )
    load_or_resume(checkpointer, weights, resume)
