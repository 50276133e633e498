"""Detectron2's checkpointer, which here converts foreign weights and refuses wrong ones."""

import logging
import os
import re
import tempfile
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from torch import Tensor
from torch import distributed as dist

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from ..stored_settings import STATE_KEY, StoresSettings, settings_of
from .convert import convert_checkpoint, detect_source, num_classes_of, unwrap
from .files import CheckpointError, check_pickle, read_checkpoint
from .finding import find_weights, last_checkpoint
from .overrides import OVERRIDES_KEY, override_model
from .processes import run_on_main
from .writing import CheckpointWriter

logger = logging.getLogger(__name__)

_CLASS_NAMES_KEY = "class_names"  # of a checkpoint that names its classes
# Names that weights may lack or have in excess: settings, counters, what Detectron2 once stored.
IS_OPTIONAL = re.compile(
    rf"(.*\.)?({STATE_KEY}|num_batches_tracked)|pixel_(mean|std)|.*anchor_generator\.cell_anchors.*"
)


class ATSSCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that weights that do not fit are an error.

    Detectron2 logs a warning and goes on with random weights, which is noticed days later.

    Weights of the authors, of mmdetection and of torchvision's ResNets are recognised and converted
    while loading. The model gets the geometry they were trained with; each change is logged. Files
    are read without running their code (`read_checkpoint`); zoo files at `detectron2://` and
    `catalog://` go to Detectron2's own loader unchecked.

    Args:
        model, save_dir, save_to_disk, **checkpointables: see `DetectionCheckpointer`.
        class_names: names of the classes in their order, saved with the weights.

    Attributes:
        writer: of `save`; how it writes, and how many stay, can be set there.
    """

    def __init__(self, model, save_dir="", *, class_names=None, **options):
        super().__init__(model, save_dir, **options)
        self.class_names = class_names
        self.writer = CheckpointWriter(save_dir)
        self._is_zoo = False
        self._allow_partial = False

    def load(self, path: str, *args, allow_partial: bool = False, **kwargs) -> Dict[str, Any]:
        """See `DetectionCheckpointer.load`.

        Args:
            path: file, URL, or folder of a run, whose last checkpoint is meant.
            allow_partial: load what fits, to train the rest; else all parameters must be there.

        Raises:
            CheckpointError: a `ValueError`, for a file that cannot be had, is truncated, needs to
                run code, or holds weights of another architecture or number of classes.
        """
        path = str(path)
        self._is_zoo = path.startswith(("detectron2://", "catalog://"))
        self._allow_partial = allow_partial
        path = find_weights(path)
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set after an error

    def save(self, name: str, **kwargs: Any) -> None:
        """See `DetectionCheckpointer.save`; adds class names, and the geometry of a two-stage model
        that its parts do not store themselves.

        Raises:
            OSError: see `CheckpointWriter.write`.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content.update((key, part.state_dict()) for key, part in self.checkpointables.items())
        if self.class_names:
            content[_CLASS_NAMES_KEY] = list(self.class_names)
        if not isinstance(self.model, StoresSettings):
            content[OVERRIDES_KEY] = settings_of(self.model)
        logger.info("Saving checkpoint %s", os.path.join(self.save_dir, f"{name}.pth"))
        self.writer.write({**content, **kwargs}, f"{name}.pth")

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
            content = {"model": unwrap(content)}
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
            weights = unwrap({"model": checkpoint["model"]})
            checkpoint["model"] = override_model(self.model, overrides, weights)
        found = [re.sub(r"^module\.", "", name) for name in checkpoint["model"]]
        is_translated = checkpoint.get("matching_heuristics", False)
        needed = [name for name in self.model.state_dict() if not IS_OPTIONAL.fullmatch(name)]
        incompatible = super()._load_model(checkpoint)
        wrong_shape = [name for name, *_ in incompatible.incorrect_shapes]
        # Batch norms put what they miss into the dict while loading, so look at the file as well.
        missing = {*incompatible.missing_keys, *([] if is_translated else {*needed} - {*found})}
        missing -= {*wrong_shape}
        absent = {*missing, *wrong_shape}
        if all(name in absent for name, _ in self.model.named_parameters()):
            raise CheckpointError(
                "The weights match no parameter of the model: they have names such as "
                f"{found[:3]}, the model needs names such as {needed[:3]}. Check the file and "
                "train.init_checkpoint (MODEL.WEIGHTS)."
            )
        _report(
            {
                "missing": [n for n in needed if n in missing],
                "of another shape": wrong_shape,
                "unknown to the model": [
                    n for n in incompatible.unexpected_keys if not IS_OPTIONAL.fullmatch(n)
                ],
            },
            self._allow_partial,
        )
        return incompatible

    def _log_incompatible_keys(self, incompatible) -> None:
        pass  # `_report` says it in one line


def _report(unfit: Dict[str, List[str]], allow_partial: bool) -> None:
    """Say which weights do not fit; raise `CheckpointError` where all must."""
    text = _listed(unfit)
    if text and not allow_partial:
        raise CheckpointError(
            f"The weights are not those of this model: {text}. Use the config that they were "
            "trained with, config.yaml in the folder of their run, with its number of classes "
            "(model.num_classes, MODEL.ATSS.NUM_CLASSES)."
        )
    if text:
        logger.warning("Parameters that are not loaded start anew: %s.", text)


def _listed(unfit: Dict[str, List[str]]) -> str:
    """The first names of each kind that has some, and how many they are."""
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in unfit.items()
        if names
    )


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
    unfit = {
        "unknown to the model": [n for n in weights if n not in model],
        "of another shape": [
            n for n in weights if n in model and weights[n].shape != model[n].shape
        ],
        "missing": [n for n in needed_names if n not in weights and not IS_OPTIONAL.fullmatch(n)],
    }
    if any(unfit.values()):
        raise CheckpointError(
            f"{filename!r} holds weights of another architecture: {_listed(unfit)}. Choose the "
            "config of these weights (depth, groups, deformable stages)."
        )


class Loaded(NamedTuple):
    """What weights brought with them.

    Attributes:
        class_names: in the order of the classes; None if the weights do not name them.
        changes: settings of the model that the weights changed, by LazyConfig keys.
        num_iters: how many iterations the run had done that saved them, 0 if they do not say.
    """

    class_names: Optional[List[str]]
    changes: Dict[str, Any]
    num_iters: int


def require_weights(folder: str, weights: str, resume: bool) -> str:
    """Find the weights of a run, before anything takes time. All workers call it.

    Args:
        folder: of the run.
        weights: path or URL of the initial weights, or folder of another run; "" for none.
        resume: whether to continue from the last checkpoint in `folder`.

    Returns:
        Path of the file on the main worker, or of a zoo; "" for none.

    Raises:
        FileNotFoundError: nothing to resume, or no such weights.
        CheckpointError: weights that cannot be downloaded, or no complete checkpoint to resume.
    """
    if resume:
        return run_on_main(last_checkpoint, folder, "--resume: ")
    return run_on_main(find_weights, weights)


def load_or_resume(
    checkpointer: ATSSCheckpointer, weights: str, resume: bool, allow_partial: bool = False
) -> Loaded:
    """Load the initial weights, or everything of the last checkpoint.

    All workers call it. Those that cannot see the file get it from the main worker.

    Args:
        checkpointer: of the model and, to resume, the trainer.
        weights, resume: see `require_weights`, with the checkpointer's folder.
        allow_partial: load what fits of initial weights, to train the rest.

    Raises:
        FileNotFoundError, CheckpointError: see `require_weights` and `ATSSCheckpointer.load`.
    """
    path = require_weights(checkpointer.save_dir, weights, resume)
    before = settings_of(checkpointer.model)
    rest: Dict[str, Any] = {}
    if path:
        only_model = {} if resume else {"checkpointables": [], "allow_partial": allow_partial}
        with _on_all_workers(path) as local_path:
            rest = checkpointer.load(local_path, **only_model)
    after = settings_of(checkpointer.model)
    changes = {key: value for key, value in after.items() if value != before[key]}
    return Loaded(rest.get(_CLASS_NAMES_KEY), changes, rest.get("iteration", -1) + 1)


@contextmanager
def _on_all_workers(path: str) -> Iterator[str]:
    """A path that this worker can read; a temporary copy where only the main worker sees it."""
    is_missing = "://" not in path and not os.path.isfile(path)
    if not any(comm.all_gather(is_missing)):
        yield path
        return
    content: List[Any] = [None]
    if comm.is_main_process():
        with open(path, "rb") as file:
            content = [file.read()]
    dist.broadcast_object_list(content, src=0, group=comm._get_global_gloo_group())
    if not is_missing:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, os.path.basename(path))
        with open(copy, "wb") as file:
            file.write(content[0])
        yield copy
