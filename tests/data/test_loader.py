"""Loader of training batches: the same tensors with any processes, and after resuming."""

import copy
import itertools
import logging
import random

import numpy as np
import pytest
import torch
from atss.config import add_atss_config
from atss.data import NamingMapper, build_train_loader
from atss.data.loader import SAMPLERS, TrainLoader
from atss.data.stream import TrainingStream
from atss.model_zoo import config_file
from atss.trainer import Trainer
from atss.training import load_lazy_config
from PIL import Image

import detectron2.data.transforms as T
from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm

BATCH_SIZE = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """13 images of random colours, every third not wider than high, with one object each."""
    folder, rng, dicts = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for i in range(13):
        height, width = (32, 24) if i % 3 == 0 else (24, 40)
        file = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file)
        box = {"bbox": [2, 3, 15, 17], "bbox_mode": 0, "category_id": i % 2}
        dicts.append(
            {
                "file_name": str(file),
                "image_id": i,
                "height": height,
                "width": width,
                "annotations": [box],
            }
        )
    return dicts


def augmenting_mapper():
    augmentations = [
        T.ResizeShortestEdge([20, 40], 60, "range"),
        T.RandomBrightness(0.5, 1.5),
        T.RandomFlip(),
    ]
    return NamingMapper(is_train=True, augmentations=augmentations, image_format="BGR")


class Drawing:
    """A mapper that draws from all generators and cannot use some images."""

    def __init__(self, unusable=()):
        self.unusable = unusable

    def __call__(self, image):
        drawn = torch.rand(2).tolist() + [random.random(), np.random.rand()]
        if image["image_id"] in self.unusable:
            return None
        return {"image_id": image["image_id"], "drawn": drawn}


def drawing_loader(images, unusable=(), batch_size=BATCH_SIZE, seed=3, **options):
    is_tall = np.array([image["width"] <= image["height"] for image in images])
    stream = TrainingStream(len(images), batch_size, seed, is_tall)
    return TrainLoader(images, Drawing(unusable), stream, **options)


def take(loader, count):
    return list(itertools.islice(loader, count))


def global_batches(make, world_size, count):
    """Batches of all processes, joined."""
    shares = [take(make(rank=r, world_size=world_size), count) for r in range(world_size)]
    return [sum(batch, []) for batch in zip(*shares)]


@pytest.fixture(scope="module")
def expected(images):
    return global_batches(lambda **ranks: augmented(images, **ranks), 1, 9)


def augmented(images, **options):
    is_tall = np.array([image["width"] <= image["height"] for image in images])
    stream = TrainingStream(len(images), BATCH_SIZE, 3, is_tall)
    return TrainLoader(images, augmenting_mapper(), stream, **options)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_images_and_tensors_do_not_depend_on_processes_and_workers(
    num_workers, world_size, images, expected
):
    found = global_batches(
        lambda **ranks: augmented(images, num_workers=num_workers, **ranks), world_size, 9
    )
    for mine, other in zip(found, expected):
        for a, b in zip(mine, other):
            assert a["file_name"] == b["file_name"]
            assert torch.equal(a["image"], b["image"])
            boxes = [item["instances"].gt_boxes.tensor for item in (a, b)]
            assert torch.equal(*boxes)
    assert len({item["image"].shape for batch in found for item in batch}) > 5  # augmented


def test_same_image_is_augmented_otherwise_in_another_epoch_and_with_another_seed(images):
    drawn = [
        tuple(item["drawn"])
        for seed in (3, 4)
        for batch in take(drawing_loader(images, seed=seed), 20)
        for item in batch
    ]
    assert len(set(drawn)) == 2 * 20 * BATCH_SIZE


@pytest.mark.parametrize("num_workers", [0, 2])
def test_generators_of_the_process_are_left_alone(num_workers, images):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    loader = drawing_loader(images, unusable=[1, 2], num_workers=num_workers)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
        assert states() == before
    del iterator
    assert states() == before

    with pytest.raises(ValueError, match="cannot be used"):
        next(iter(drawing_loader(images, unusable=range(13))))
    assert states() == before


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_image_in_place_of_one_that_cannot_be_used_is_always_the_same(
    num_workers, world_size, images
):
    unusable = {1, 3, 7}
    found = global_batches(
        lambda **ranks: drawing_loader(images, unusable, num_workers=num_workers, **ranks),
        world_size,
        12,
    )
    assert found == take(drawing_loader(images, unusable), 12)
    all_usable = take(drawing_loader(images), 12)
    num_replaced = 0
    for mine, other in zip(found, all_usable):
        for a, b in zip(mine, other):
            assert a["image_id"] not in unusable
            assert (a == b) == (b["image_id"] not in unusable)  # all others as they were
            assert (a["image_id"] % 3 == 0) == (b["image_id"] % 3 == 0)  # the same orientation
            num_replaced += a != b
    assert num_replaced > 5


def test_images_of_the_other_orientation_serve_where_none_of_an_orientation_can(images):
    batches = take(drawing_loader(images, unusable=range(0, 13, 3)), 12)
    assert all(item["image_id"] % 3 for batch in batches for item in batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_without_a_usable_image_are_named(num_workers, images):
    loader = drawing_loader(images, unusable=range(13), num_workers=num_workers)
    with pytest.raises(ValueError, match=r"\.png cannot be used, nor can 199 images drawn in its"):
        next(iter(loader))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resumed_loader_continues_after_what_was_consumed_with_any_processes(
    num_workers, world_size, images
):
    undisturbed = take(drawing_loader(images), 14)
    loader = drawing_loader(images, num_workers=2)
    for count, _ in enumerate(iter(loader), 1):  # two workers prefetch more than was consumed
        if count == 5:
            break
    state = loader.state_dict()
    assert (state["batches"], state["batch_size"], state["seed"]) == (5, BATCH_SIZE, 3)
    assert all(type(value) is int for value in state.values())  # for torch.load(weights_only=True)

    def resumed(**ranks):
        # A seed that was drawn is another one; the checkpoint's is kept.
        loader = drawing_loader(images, seed=99, num_workers=num_workers, **ranks)
        iterator = iter(loader)  # as SimpleTrainer does before a checkpoint is read
        loader.load_state_dict(copy.deepcopy(state))
        return iterator

    assert global_batches(resumed, world_size, 9) == undisturbed[5:]


def test_batches_of_another_size_continue_after_the_same_number_of_images_and_it_is_said(
    images, caplog
):
    loader = drawing_loader(images)
    take(loader, 5)
    other = drawing_loader(images, batch_size=6)
    with caplog.at_level(logging.WARNING, "atss"):
        other.load_state_dict(loader.state_dict())
    assert "A batch has 6 images, in the checkpoint it had 4" in caplog.text
    assert "continues after 18 images, of 20 that were trained on" in caplog.text
    assert take(other, 2) == take(drawing_loader(images, batch_size=6), 5)[3:]
    assert other.state_dict()["batches"] == 5


def test_other_images_than_those_of_the_checkpoint_are_noticed(images, caplog):
    loader = drawing_loader(images)
    take(loader, 2)
    with caplog.at_level(logging.WARNING, "atss"):
        drawing_loader(images).load_state_dict(loader.state_dict())
        assert not caplog.text
        drawing_loader(images[:-1]).load_state_dict(loader.state_dict())
    assert "are not those of the checkpoint: training continues at batch 2" in caplog.text


def test_state_that_comes_too_late_is_refused(images):
    loader = drawing_loader(images)
    iterator = iter(loader)
    loader.load_state_dict(loader.state_dict())
    next(iterator)
    with pytest.raises(RuntimeError, match="before its first batch"):
        loader.load_state_dict(loader.state_dict())


def test_second_iterator_goes_on(images):
    loader = drawing_loader(images)
    assert take(loader, 3) + take(loader, 3) == take(drawing_loader(images), 6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_have_detectron2s_names(sampler, images):
    loader = build_train_loader(
        images, Drawing(), 2, sampler=sampler, repeat_threshold=1.0, subset_ratio=0.5, seed=1
    )
    stream = loader.stream
    assert (stream.repeat_factors is not None) == (sampler == "RepeatFactorTrainingSampler")
    assert len(stream.image_idxs) == (6 if sampler == "RandomSubsetTrainingSampler" else 13)
    assert len(next(iter(loader))) == 2


@pytest.mark.parametrize("repeat_sqrt, power", [(True, 0.5), (False, 1.0)])
def test_images_of_rare_classes_are_repeated(repeat_sqrt, power, images):
    loader = build_train_loader(
        images, Drawing(), 2, sampler="RepeatFactorTrainingSampler", repeat_threshold=1.0,
        repeat_sqrt=repeat_sqrt, seed=1,
    )  # fmt: skip
    # Class 0 is in 7 of 13 images, class 1 in 6.
    wanted = [(13 / (6 if i % 2 else 7)) ** power for i in range(13)]
    np.testing.assert_allclose(loader.stream.repeat_factors, wanted, rtol=1e-6)


def test_negative_seed_is_drawn_and_others_are_taken(images, caplog):
    with caplog.at_level(logging.INFO, "atss"):
        drawn = {build_train_loader(images, Drawing(), 2, seed=-1).stream.seed for _ in range(4)}
    assert len(drawn) == 4 and "drawn because none was given" in caplog.text
    assert build_train_loader(images, Drawing(), 2, seed=5).stream.seed == 5


def test_images_without_sizes_are_not_grouped_and_it_is_said(images, caplog):
    unknown = [*images[1:], {k: v for k, v in images[0].items() if k not in ("width", "height")}]
    with caplog.at_level(logging.WARNING, "atss"):
        loader = build_train_loader(unknown, augmenting_mapper(), 2, seed=1)
    assert loader.stream.is_tall is None and "no width and height" in caplog.text
    assert len(take(loader, 7)) == 7
    assert build_train_loader(images, Drawing(), 2, seed=1).stream.is_tall.tolist() == [
        i % 3 == 0 for i in range(13)
    ]
    ungrouped = build_train_loader(images, Drawing(), 2, aspect_ratio_grouping=False, seed=1)
    assert ungrouped.stream.is_tall is None


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return itertools.repeat({})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler": "Other"}, "one of .*'TrainingSampler'.*got 'Other'"),
        ({"total_batch_size": 0}, "integer total_batch_size >= 1, got 0"),
        ({"total_batch_size": 3}, "3 images cannot be shared by 2 processes"),
        (
            {"sampler": "RandomSubsetTrainingSampler", "subset_ratio": 1.5},
            "subset_ratio in .*got 1.5.*RANDOM_SUBSET_RATIO",
        ),
        ({"dataset": Endless()}, "got an IterableDataset.*build_detection_train_loader"),
    ],
)
def test_values_that_do_not_suit_are_named(changes, message, images, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=message):
        build_train_loader(
            **{"dataset": images, "mapper": Drawing(), "total_batch_size": 4, "seed": 1, **changes}
        )


def test_ranks_are_those_of_the_process_group(images, monkeypatch):
    expected = take(build_train_loader(images, Drawing(), 4, seed=1), 3)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    loader = build_train_loader(images, Drawing(), 4, seed=1)
    assert take(loader, 3) == [batch[2:] for batch in expected]


@pytest.fixture
def registered(images):
    DatasetCatalog.register("own_images", lambda: copy.deepcopy(images))
    yield "own_images"
    DatasetCatalog.remove("own_images")


@pytest.fixture
def yaml_config(registered):
    cfg = get_cfg()
    add_atss_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ATSS.NUM_CLASSES = "ATSSDetector", 2
    cfg.DATASETS.TRAIN, cfg.INPUT.MIN_SIZE_TRAIN = (registered,), (32,)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 0, 2, 6
    return cfg


def test_yaml_config_has_detectron2s_keys(yaml_config):
    loader = Trainer.build_train_loader(yaml_config)
    assert isinstance(loader, TrainLoader) and loader.stream.seed == 6
    assert loader.stream.batch_size == 2 and loader.stream.is_tall is not None
    assert {"image", "instances", "file_name"} <= {*next(iter(loader))[0]}

    loading = yaml_config.DATALOADER
    loading.SAMPLER_TRAIN, loading.REPEAT_THRESHOLD = "RepeatFactorTrainingSampler", 1.0
    loading.ASPECT_RATIO_GROUPING, loading.REPEAT_SQRT = False, False
    stream = Trainer.build_train_loader(yaml_config).stream
    assert stream.is_tall is None and stream.repeat_factors.max() == pytest.approx(13 / 6)

    loading.SAMPLER_TRAIN, loading.RANDOM_SUBSET_RATIO = "RandomSubsetTrainingSampler", 0.4
    assert len(Trainer.build_train_loader(yaml_config).stream.image_idxs) == 5

    loading.SAMPLER_TRAIN = "NoSuchSampler"
    with pytest.raises(ValueError, match="Unknown training sampler: NoSuchSampler"):
        Trainer.build_train_loader(yaml_config)  # Detectron2's error


class Counting(torch.nn.Module):
    """A model whose loss any optimizer can lower."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return {"loss": self.weight * len(batch)}


@pytest.mark.parametrize("build", [build_train_loader, build_detection_train_loader])
def test_both_loaders_train_in_detectron2s_trainer(build, images):
    loader = build(copy.deepcopy(images), mapper=augmenting_mapper(), total_batch_size=2)
    model = Counting()
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), 0.1))
    trainer.train(0, 3)
    assert model.weight.item() == pytest.approx(1 - 3 * 0.1 * 2)
    if isinstance(loader, TrainLoader):
        assert loader.state_dict()["batches"] == 3


def test_config_makes_the_loader_with_the_seed_of_the_training(registered):
    cfg = load_lazy_config(
        config_file("toy/atss_toy"),
        ["train.seed=9", "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0",
         f"dataloader.train.dataset.names=[{registered}]"],
    )  # fmt: skip
    loader = instantiate(cfg.dataloader.train)
    assert loader.stream.seed == 9
    assert min(next(iter(loader))[0]["image"].shape[1:]) == 256
