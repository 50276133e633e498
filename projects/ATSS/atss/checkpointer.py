"""Do these weights belong to this model? Detectron2's checkpointer, which says so."""

from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

__all__ = ["ATSSCheckpointer", "load_or_resume"]


class ATSSCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that weights that match nothing are an error.

    Detectron2 logs a warning and trains from random weights, which shows days later.
    """

    def _load_model(self, checkpoint: Any):
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


def load_or_resume(checkpointer: ATSSCheckpointer, weights: str, resume: bool) -> None:
    """Load the initial weights, or everything of the last checkpoint.

    Args:
        checkpointer: of the model and, to resume, the trainer.
        weights: path or URL of the initial weights; "" for none.
        resume: whether to go on from the last checkpoint of the checkpointer's folder.

    Raises:
        FileNotFoundError: nothing to resume, or no such weights.
        ValueError: weights that match no parameter.
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
