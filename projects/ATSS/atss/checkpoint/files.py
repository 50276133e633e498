"""Checkpoint files, read without running their code and written completely or not at all.

Reading a pickle can run whatever code its author chose. `.pth` files are read as tensors and
plain values only; `.pkl` files, which hold numpy arrays in Detectron2's zoo, are checked first.
"""

import hashlib
import os
import pickle
import re
import types
from typing import IO, Any, Callable, Dict

import torch

from detectron2.utils.file_io import PathManager

UNFINISHED = ".part"  # ends the name of a file until it is complete
# The first digits of a hash end a file's name, but so may a date, 20200209.
_DATE = r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
_HASH_SUFFIX = re.compile(rf"-(?!{_DATE}\.pth$)([0-9a-f]{{8,64}})\.pth$")
# Words of PyTorch's reader for a file that asks for more than tensors and plain values.
_NEEDS_CODE = ("GLOBAL", "Unsupported class", "was not an allowed global")
# What numpy needs to rebuild arrays; none of it runs code of the file.
_HARMLESS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core")
      for name in ("_reconstruct", "scalar")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}  # fmt: skip
# What PyTorch needs besides to rebuild tensors.
_TENSORS = {
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch._utils", f"_rebuild_{kind}") for kind in ("tensor", "tensor_v2", "parameter")),
}


class CheckpointError(ValueError):
    """Weights that cannot be used, with the reason in one sentence."""


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Content of a local `.pth` file: tensors and plain values, nothing that runs.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: for a truncated or corrupt file, one that needs to run code, or one that
            is not a dict.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint file {path!r}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not any(word in str(error) for word in _NEEDS_CODE):
            raise _corrupt(path, error) from error
        content = _read_without_logs(path)
    except Exception as error:  # a file that is no checkpoint raises nearly anything
        raise _corrupt(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path!r} holds a {type(content).__name__}; a checkpoint needs to be a dict of "
            "tensors by name."
        )
    return content


def _read_without_logs(path: str) -> Any:
    """Content of a file of mmengine, whose logs are left out: its classes are not imported."""
    reader = types.SimpleNamespace(
        __name__="pickle", Unpickler=_TensorsAndLogs, load=_load_tensors_and_logs
    )
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
    except CheckpointError as error:
        raise CheckpointError(f"{path!r} is refused: {error}") from None
    except Exception as error:  # a corrupt pickle raises nearly anything
        raise _corrupt(path, error) from error


def write_checkpoint(content: Dict[str, Any], path: str) -> None:
    """Write tensors and plain values completely or not at all: an existing file stays until then.

    Raises:
        OSError: if it cannot be written, as where its folder does not exist or the disk is full.
    """
    try:
        _write_safely(path, lambda file: torch.save(content, file))
    except RuntimeError as error:  # PyTorch closes its archive after the error, and fails again
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_text(text: str, path: str) -> None:
    """As `write_checkpoint`, for a short text."""
    _write_safely(path, lambda file: file.write(text.encode()))


def _write_safely(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    temporary = f"{path}.{os.getpid()}{UNFINISHED}"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    if os.name == "posix":  # the new name survives a power cut, too
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError:
            pass  # some network file systems do not offer it
        finally:
            os.close(folder)


def check_pickle(path: str) -> None:
    """Refuse a local `.pkl` file that holds anything but numpy arrays and plain values.

    Raises:
        CheckpointError: naming what it would import, or saying that it is corrupt.
    """
    with open(path, "rb") as file:
        try:
            _ArraysOnly(file, encoding="latin1").load()
        except CheckpointError as error:
            raise CheckpointError(f"{path!r} is refused: {error}") from None
        except Exception as error:  # a corrupt pickle raises nearly anything
            raise _corrupt(path, error) from error


def fetch(url: str) -> str:
    """Local copy of a checkpoint, downloaded once; checked where its name ends in its hash.

    Args:
        url: address or path, for any of iopath's handlers.

    Raises:
        CheckpointError: if it cannot be had, or is not the file that its name promises.
    """
    try:
        path = PathManager.get_local_path(url)
    except Exception as error:  # each handler has errors of its own
        raise CheckpointError(
            f"Cannot get {url} ({first_line(error)}). Check the network, or download the file "
            "elsewhere and give its path as train.init_checkpoint (MODEL.WEIGHTS)."
        ) from error
    expected = _HASH_SUFFIX.search(url)
    if "://" in url and expected and os.path.isfile(path):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        if not digest.hexdigest().startswith(expected.group(1)):
            raise CheckpointError(
                f"{url} is not what its name promises: its sha256 starts with "
                f"{digest.hexdigest()[:8]}, not {expected.group(1)}. Delete {path!r} and try again."
            )
    return path


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise CheckpointError(
            f"it would import {module}.{name}, and reading it could run code; only tensors, numpy "
            "arrays and plain values are read. Where you trust the file, save its weights alone, "
            "a dict of tensors by name, with the program that wrote it."
        )


class _LeftOut:
    """Stands where a file has an object of a class that is not imported; takes what it is given."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def append(self, *args: Any) -> None:
        pass

    extend = __setitem__ = __setstate__ = append


class _TensorsAndLogs(_ArraysOnly):
    def find_class(self, module: str, name: str):
        if (module, name) in _TENSORS:
            return pickle.Unpickler.find_class(self, module, name)
        is_log = module.split(".")[0] in ("mmengine", "mmcv", "mmdet", "numpy")
        if is_log or (module.strip("_").rstrip("s"), name) == ("builtin", "getattr"):
            return _LeftOut
        return super().find_class(module, name)


def _load_tensors_and_logs(file: Any, **options: Any) -> Any:
    return _TensorsAndLogs(file, **options).load()


def _corrupt(path: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path!r} is no complete checkpoint: it is truncated, corrupt or of another kind "
        f"({first_line(error)})."
    )


def first_line(error: Exception) -> str:
    """Without escapes for terminals."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
