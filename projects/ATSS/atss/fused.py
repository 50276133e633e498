"""Functions that become one kernel where PyTorch can compile them and run as they are elsewhere."""

import warnings
from typing import Callable

import torch

__all__ = ["Fused", "is_compiling"]


class Fused:
    """A function, compiled on its first call (`torch.compile`, any shapes).

    Compilation needs Triton on a GPU and a C++ compiler on a CPU. Where it fails, that is said once
    and the function runs operator by operator from then on.

    Args:
        function: of tensors and numbers.
    """

    def __init__(self, function: Callable):
        self.function = function
        self._compiled = None
        self._failed = False

    def __call__(self, *args):
        if self._failed:
            return self.function(*args)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self.function, dynamic=True)
            return self._compiled(*args)
        except Exception as error:  # compilers fail in many ways; out of memory is not theirs
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self._failed = True
            warnings.warn(
                f"{self.function.__name__} could not be compiled and runs unfused from now on: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                stacklevel=2,
            )
            return self.function(*args)


def is_compiling() -> bool:
    """Whether `torch.compile` or `torch.export` is tracing the caller."""
    # torch 2.0 has no torch.compiler, and its torch._dynamo is there only once something compiles;
    # 2.1 and 2.2 have the function in the second place.
    for name in ("compiler", "_dynamo"):
        namespace = getattr(torch, name, None)
        if hasattr(namespace, "is_compiling"):
            return namespace.is_compiling()
    return False
