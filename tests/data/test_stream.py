"""Order of the training images: a plain loop as twin, and what must hold of any stream."""

import itertools

import numpy as np
import pytest
from atss.data.stream import MAX_ATTEMPTS, TrainingStream, share_of


def tall(count, share=0.3, seed=0):
    return np.random.default_rng(seed).random(count) < share


def factors(count):
    return np.random.default_rng(1).uniform(0.5, 3.5, count)


# (num_images, batch_size, further arguments); some need several epochs for a batch.
STREAMS = {
    "plain": (23, 4, {}),
    "in order": (23, 4, {"shuffle": False}),
    "grouped": (23, 4, {"is_tall": tall(23)}),
    "one tall": (9, 4, {"is_tall": np.arange(9) == 5}),
    "none tall": (9, 4, {"is_tall": np.zeros(9, dtype=bool)}),
    "few images": (3, 16, {"is_tall": tall(3, 0.5)}),
    "repeated": (23, 4, {"is_tall": tall(23), "repeat_factors": factors(23)}),
    "few repeated": (3, 16, {"is_tall": tall(3, 0.5), "repeat_factors": factors(3)}),
    "subset": (40, 3, {"is_tall": tall(40), "subset_ratio": 0.4}),
}


def make(name, seed=7, **changes):
    num_images, batch_size, options = STREAMS[name]
    return TrainingStream(
        **{"num_images": num_images, "batch_size": batch_size, "seed": seed, **options, **changes}
    )


def epoch_of(stream, epoch):
    """Image indices of an epoch, drawn as the docstrings say."""
    draw = np.random.default_rng(np.random.SeedSequence(stream.seed, spawn_key=(1, epoch)))
    images = []
    if stream.repeat_factors is None:
        images = list(stream.image_idxs)
    else:
        for image, part in zip(stream.image_idxs, draw.random(len(stream.image_idxs))):
            factor = stream.repeat_factors[image]
            images += [image] * (int(factor) + (part < factor - int(factor)))
    return list(draw.permutation(images)) if stream.shuffle else images


def slow_batches(stream):
    """Twin of `TrainingStream.batches`: one element after the other."""
    buckets, position = ([], []), 0
    for epoch in itertools.count():
        for image in epoch_of(stream, epoch):
            bucket = buckets[0 if stream.is_tall is None else int(stream.is_tall[image])]
            bucket.append((position, int(image)))
            position += 1
            if len(bucket) == stream.batch_size:
                yield bucket.copy()
                bucket.clear()


def take(batches, count):
    return [np.asarray(batch).tolist() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("name", STREAMS)
def test_batches_are_those_of_a_plain_loop(name):
    slow = take(slow_batches(make(name)), 60)
    assert take(make(name).batches(), 60) == [[list(pair) for pair in batch] for batch in slow]


@pytest.mark.parametrize("name", STREAMS)
def test_skipping_ahead_equals_running(name):
    run = take(make(name).batches(), 90)
    for start in range(80):
        assert take(make(name).batches(start), 9) == run[start : start + 9], start


def test_skipping_ahead_equals_running_in_random_streams():
    rng = np.random.default_rng(3)
    for case in range(60):
        count, size = (int(n) for n in rng.integers(1, (30, 12)))
        options = {"is_tall": rng.random(count) < rng.random()} if case % 2 else {}
        if case % 3 == 0:
            options["repeat_factors"] = rng.uniform(0.1, 3, count)
        stream = TrainingStream(count, size, case, **options)
        run = take(slow_batches(stream), 40)
        assert take(stream.batches(), 40) == [[list(pair) for pair in batch] for batch in run]
        start = int(rng.integers(0, 38))
        assert take(stream.batches(start), 2) == take(stream.batches(), 40)[start : start + 2]


def test_shares_of_1_to_256_processes_are_disjoint_and_complete():
    for world_size in range(1, 257):
        stream = TrainingStream(997, 2 * world_size, 5, is_tall=tall(997))
        for batch in itertools.islice(stream.batches(), 8):
            shares = [share_of(batch, rank, world_size) for rank in range(world_size)]
            assert {len(share) for share in shares} == {2}
            assert np.array_equal(np.concatenate(shares), batch)
            assert len(set(batch[:, 0])) == len(batch)


@pytest.mark.parametrize("name", STREAMS)
def test_positions_count_up_and_nothing_is_lost_except_what_waits(name):
    stream = make(name)
    size = stream.batch_size
    emitted = np.concatenate(list(itertools.islice(stream.batches(), 60)))
    positions = set(emitted[:, 0].tolist())
    assert len(positions) == len(emitted)  # none comes twice
    images = dict(emitted.tolist())
    # Where the last batch was full, all before it is out, or waits: less than a batch in a bucket.
    waiting = [p for p in range(emitted[-1, 0] + 1) if p not in positions]
    ordered = list(itertools.chain.from_iterable(epoch_of(stream, e) for e in range(400)))
    assert all(ordered[position] == image for position, image in images.items())
    is_tall = np.zeros(stream.num_images, bool) if stream.is_tall is None else stream.is_tall
    counts = np.bincount([is_tall[ordered[p]] for p in waiting], minlength=2)
    assert (counts < size).all()


@pytest.mark.parametrize("name", [n for n in STREAMS if "is_tall" in STREAMS[n][2]])
def test_batch_has_one_orientation(name):
    stream = make(name)
    for batch in itertools.islice(stream.batches(), 50):
        assert len(set(stream.is_tall[batch[:, 1]])) == 1


def test_epoch_has_every_image_once_and_another_order_each_time():
    epochs = [np.concatenate(list(itertools.islice(TrainingStream(24, 4, 1).batches(i), 6)))
              for i in (0, 6)]  # fmt: skip
    for epoch in epochs:
        assert sorted(epoch[:, 1]) == list(range(24))
    assert not np.array_equal(epochs[0][:, 1], epochs[1][:, 1])


def test_repeat_factors_are_met_on_average():
    stream = TrainingStream(4, 5, 2, repeat_factors=np.array([1.0, 2.0, 0.5, 1.5]))
    images = np.concatenate(list(itertools.islice(stream.batches(), 2000)))[:, 1]
    share = np.bincount(images) / len(images)
    np.testing.assert_allclose(share, [0.2, 0.4, 0.1, 0.3], atol=0.01)


def test_subset_is_drawn_from_the_seed_and_a_smaller_one_is_part_of_it():
    large, small = (TrainingStream(100, 2, 4, subset_ratio=ratio) for ratio in (0.5, 0.2))
    assert len(large.image_idxs) == 50 and set(small.image_idxs) < set(large.image_idxs)
    other = TrainingStream(100, 2, 5, subset_ratio=0.5)
    assert not np.array_equal(large.image_idxs, other.image_idxs)


def test_other_seeds_and_positions_give_other_random_numbers():
    words = {
        tuple(make("plain", seed).augmentation_words(position, attempt))
        for seed, position, attempt in itertools.product(range(5), range(200), range(3))
    }
    assert len(words) == 5 * 200 * 3
    # Positions beyond 32 bits are other positions.
    low, high = (make("plain").augmentation_words(p) for p in (5, 5 + 2**32))
    assert not np.array_equal(low, high)


def test_image_in_place_of_another_has_its_orientation_first_and_is_in_the_subset():
    stream = make("subset")
    image = int(stream.image_idxs[0])
    early, late = (
        {stream.image_at(position, image, attempt) for position in range(200)}
        for attempt in (1, MAX_ATTEMPTS - 1)
    )
    mine = stream.is_tall[image]
    assert early == {i for i in stream.image_idxs if stream.is_tall[i] == mine}
    assert late == set(stream.image_idxs)
    assert stream.image_at(3, image, 0) == image
    assert stream.image_at(3, image, 1) == make("subset").image_at(3, image, 1)


def test_checksum_differs_for_other_images_and_samplers_only():
    stream = make("repeated")
    same = (make("repeated", seed=8), make("repeated", batch_size=8))
    assert {other.checksum for other in same} == {stream.checksum}
    others = (
        make("repeated", is_tall=None),
        make("repeated", repeat_factors=None),
        make("repeated", shuffle=False),
        make("repeated", subset_ratio=0.5),
        make("grouped", num_images=24, is_tall=tall(24)),
    )
    assert len({stream.checksum, *(other.checksum for other in others)}) == 6
