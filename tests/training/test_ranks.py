"""Every one of 256 processes, made one after the other with a process group that is not there."""

import numpy as np
import pytest
import torch
from atss.data.loader import build_train_loader
from atss.data.stream import TrainingStream, share_of
from conftest import make_input, tiny_detector
from torch import distributed as dist
from torch.testing._internal.distributed import fake_pg

from detectron2.utils import comm

WORLD_SIZE = 256


@pytest.fixture
def as_rank():
    def join(rank):
        if dist.is_initialized():
            dist.destroy_process_group()
        store = fake_pg.FakeStore()
        dist.init_process_group("fake", rank=rank, world_size=WORLD_SIZE, store=store)
        assert (comm.get_rank(), comm.get_world_size()) == (rank, WORLD_SIZE)

    yield join
    if dist.is_initialized():
        dist.destroy_process_group()


def test_positions_of_all_ranks_are_disjoint_and_complete(as_rank):
    images = [{"image_id": i, "width": 4 + i % 3, "height": 5} for i in range(3000)]
    num_batches, shares = 7, []
    for rank in range(WORLD_SIZE):
        as_rank(rank)
        loader = build_train_loader(images, lambda image: image, 512, seed=3)
        assert (loader.rank, loader.world_size) == (rank, WORLD_SIZE)
        elements = loader._elements()
        shares.append([[next(elements) for _ in range(2)] for _ in range(num_batches)])
    is_tall = np.array([image["width"] <= image["height"] for image in images])
    whole = TrainingStream(len(images), 512, 3, is_tall).batches()
    for number in range(num_batches):
        joined = [element for share in shares for element in share[number]]
        assert joined == [tuple(element) for element in next(whole).tolist()]
        assert len({position for position, _ in joined}) == 512
    assert share_of(np.arange(512), 255, WORLD_SIZE).tolist() == [510, 511]


def test_a_batch_that_the_ranks_cannot_share_is_refused(as_rank):
    as_rank(17)
    with pytest.raises(ValueError, match="500 images cannot be shared by 256"):
        build_train_loader([{"width": 1, "height": 1}], lambda image: image, 500, seed=3)


def test_all_ranks_ask_for_the_same_collectives_in_the_loss(as_rank, monkeypatch):
    calls = []
    for name in ("all_reduce", "all_gather", "broadcast", "barrier"):
        function = getattr(dist, name)

        def recording(*args, name=name, function=function, **kwargs):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            calls.append((name, [(tuple(x.shape), x.dtype) for x in tensors]))
            return function(*args, **kwargs)

        monkeypatch.setattr(dist, name, recording)
    model = tiny_detector()
    box = [[4.0, 4.0, 40.0, 30.0]]
    sequences = set()
    for rank in (0, 1, 128, 255):  # without objects on the odd ones
        as_rank(rank)
        calls.clear()
        boxes, classes = ((), ()) if rank % 2 else (box, [1])
        sum(model([make_input(boxes=boxes, classes=classes)]).values()).backward()
        sequences.add(str(calls))
    assert len(sequences) == 1 and "all_reduce" in sequences.pop()
