"""Detectron2's checkpointer, which here converts foreign weights and refuses wrong ones."""

import logging
from typing import Any, Dict

from torch import Tensor

from detectron2.checkpoint import DetectionCheckpointer

from .convert import convert_checkpoint, detect_source, num_classes_of
from .files import CheckpointError, check_pickle, fetch, read_checkpoint
from .overrides import OVERRIDES_KEY, override_model

logger = logging.getLogger(__name__)


class ATSSCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that weights that match nothing are an error.

    Detectron2 logs a warning and trains from random weights, which is noticed days later.

    Weights of the authors, of mmdetection and of torchvision's ResNets are recognised and converted
    while loading. The model gets the geometry they were trained with; each change is logged, and
    checkpoints saved later keep it. Files are read without running their code (`read_checkpoint`);
    zoo files at `detectron2://` and `catalog://` go to Detectron2's own loader unchecked.
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
            kwargs.setdefault(OVERRIDES_KEY, self._overrides)
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
        weights, overrides, dropped = convert_checkpoint(content, source)
        logger.info(
            "%s holds weights of another code base (%s): %d names converted, %d dropped.",
            filename,
            source,
            len(weights),
            len(dropped),
        )
        _check_fit(self.model.state_dict(), weights, filename)
        return {"model": weights, OVERRIDES_KEY: overrides}

    def _load_model(self, checkpoint: Any):
        overrides = checkpoint.pop(OVERRIDES_KEY, None)
        if overrides:
            weights = checkpoint["model"] = dict(checkpoint["model"])
            self._overrides, changes = override_model(self.model, overrides, weights)
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
    # Weights without a head are those of a bottom-up part alone.
    needed_names = [n for n in model if found is not None or "bottom_up" in n]
    missing = [n for n in needed_names if n not in weights and not n.startswith("pixel_")]
    for names, what in (
        ([n for n in weights if n not in model], "which the model lacks"),
        (
            [n for n in weights if n in model and weights[n].shape != model[n].shape],
            "of another shape than the model's",
        ),
        (missing, "missing, which the model needs"),
    ):
        if names:
            raise CheckpointError(
                f"{filename!r} holds weights of another architecture: {len(names)} parameters "
                f"such as {names[0]!r} {what}. Choose the config of these weights (depth, groups, "
                "deformable stages)."
            )


def require_checkpoint(checkpointer: ATSSCheckpointer) -> None:
    """Check that there is something to resume.

    Raises:
        FileNotFoundError: no checkpoint in the checkpointer's folder.
    """
    if not checkpointer.has_checkpoint():
        raise FileNotFoundError(
            f"--resume: there is no checkpoint in {checkpointer.save_dir!r}. Start without "
            "--resume, or set train.output_dir (OUTPUT_DIR) to the folder of the run to continue."
        )


def load_or_resume(checkpointer: ATSSCheckpointer, weights: str, resume: bool) -> None:
    """Load the initial weights, or everything of the last checkpoint.

    Args:
        checkpointer: of the model and, to resume, the trainer.
        weights: path or URL of the initial weights; "" for none.
        resume: whether to continue from the last checkpoint of the checkpointer's folder.

    Raises:
        FileNotFoundError: nothing to resume, or no such weights.
        ValueError: weights that cannot be used, or match no parameter.
    """
    if resume:
        require_checkpoint(checkpointer)
    try:
        checkpointer.resume_or_load(weights, resume=resume)
    except AssertionError as error:  # fvcore's way to say that a file is missing
        raise FileNotFoundError(
            f"Weights {weights!r} cannot be loaded ({error}). Check train.init_checkpoint "
            "(MODEL.WEIGHTS)."
        ) from error
