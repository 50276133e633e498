"""States of the random number generators of all processes of a run."""

import contextlib
import random
from typing import Any, Dict, Iterator, List

import numpy as np
import torch

from detectron2.utils import comm


class RandomState:
    """What a checkpoint keeps of the generators of Python, numpy, PyTorch and the GPUs.

    Restored exactly for the same number of processes. For another one, each process is seeded from
    (seed, number of iterations, rank).

    Args:
        seed: of the run; negative for one that was drawn.
    """

    def __init__(self, seed: int = -1) -> None:
        self.seed = seed
        self._states: List[Dict[str, Any]] = []

    def gather(self) -> None:
        """Collect the states of all processes, before a checkpoint is saved; all call it."""
        self._states = comm.gather(capture())

    def state_dict(self) -> Dict[str, Any]:
        """Of the last `gather`, on the main process; plain values and tensors."""
        return {"seed": self.seed, "states": self._states}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.seed = state["seed"]
        self._states = state["states"]

    def restore(self, num_iters: int) -> None:
        """Set the generators of this process as they were when the loaded checkpoint was saved.

        Args:
            num_iters: how many iterations the checkpoint had done.
        """
        if len(self._states) == comm.get_world_size():
            put_back(self._states[comm.get_rank()])
        elif self._states:
            seed = self.seed if self.seed >= 0 else self._states[0]["seed"]
            entropy = (seed, num_iters, comm.get_rank())
            words = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
            seed_all(int(words[0]) << 32 | int(words[1]))


def seed_all(seed: int) -> None:
    """Seed all generators of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # with the GPUs


def capture() -> Dict[str, Any]:
    """States of the generators of this process."""
    version, words, gauss = random.getstate()
    _, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state()
    is_on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [torch.from_numpy(numpy_words.astype(np.int64)), position, has_gauss, numpy_gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if is_on_gpu else None,
        "seed": torch.initial_seed() % 2**63,
    }


def put_back(state: Dict[str, Any]) -> None:
    """Set the generators of this process as `capture` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    numpy_words, *rest = state["numpy"]
    np.random.set_state(("MT19937", numpy_words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves the generators of this process as they were, whatever is drawn inside."""
    state = capture()
    try:
        yield
    finally:
        put_back(state)
