"""Orders that cannot be kept, and data that is not what it was, are refused by name."""

import itertools
import time

import grain
import numpy as np
import pytest
from grain.experimental import FirstFitPackIterDataset

from launch.spec import ConfigError
from trainer.data.identity import difference, identify
from trainer.data.mixture import mixture
from trainer.data.reader import Reader
from trainer.data.refusals import check_order, training_data
from trainer.data.sources import training_order
from trainer.task import Task

CALLS = itertools.count()


class Numbers:
    def __init__(self, length=60, order=None):
        self.order = list(range(length)) if order is None else list(order)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        return {"x": np.array([self.order[index], 7])}


def dataset():
    return training_order(Numbers(), 0)


def streams():
    stream = dataset().to_iter_dataset()
    yield (
        "FirstFitPackIterDataset",
        FirstFitPackIterDataset(stream, length_struct={"x": 8}, num_packing_bins=2),
    )
    yield r"IterDataset.filter\(\)", stream.filter(lambda e: True)
    yield r"batch\(\)", stream.batch(4)
    yield r"IterDataset.mix\(\)", grain.IterDataset.mix([stream, stream], [1, 1])
    yield (
        "WindowShuffleIterDataset",
        grain.experimental.WindowShuffleIterDataset(stream, window_size=3, seed=0),
    )
    yield (
        r"mp_prefetch\(\) or InterleaveIterDataset",
        stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=1)),
    )


@pytest.mark.parametrize("number", range(6))
def test_streams_are_refused_by_what_was_written(number):
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # mp_prefetch() asks them.
    name, stream = next(itertools.islice(streams(), number, None))
    with pytest.raises(ConfigError, match=f"config.task: the data uses {name}, a stream .* use "):
        check_order(stream, "data")


def two(**changes):
    return {"a": dataset(), "b": dataset(), **changes}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataset().filter(lambda e: True), r"filter\(\), .* use .*filtered\(\)"),
        (
            lambda: dataset().shuffle(seed=1),
            r"shuffle\(\) after repeat\(\), which mixes all epochs",
        ),
        (
            lambda: grain.MapDataset.range(1 << 33).shuffle(seed=1),
            r"shuffle\(\) of 8,589,934,592 examples, more than",
        ),
        (
            lambda: grain.experimental.WindowShuffleMapDataset(
                grain.MapDataset.range(10), window_size=4, seed=0
            ),
            "windows of 4, which do not divide its 10 examples",
        ),
        (
            lambda: mixture(two(), {"a": 1, "b": 1})[::2],
            r"slice\(\) upon mixture\(\): .* mix last",
        ),
        (
            lambda: mixture({"c": mixture(two(), {"a": 1, "b": 1})}, {"c": 1}),
            r"mixture\(\) upon mixture\(\)",
        ),
        (lambda: [1, 2], "is list, and must be a grain.MapDataset; .* makes one of a source"),
        (lambda: 3, "is int, and must be a grain.MapDataset"),
    ],
)
def test_orders_that_cannot_be_kept_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        check_order(make(), "data")


def test_orders_that_can_be_kept_are_not():
    check_order(mixture(two(), {"a": 1, "b": 1}).map(lambda e: e).seed(1).random_map(noise), "data")
    check_order(grain.MapDataset.mix([dataset(), dataset()], [1, 2]), "data")
    even = grain.experimental.WindowShuffleMapDataset(
        grain.MapDataset.range(12), window_size=4, seed=0
    )
    check_order(even.repeat(), "data")


def noise(example, rng):
    return {**example, "noise": rng.normal(size=3)}


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        (two(), {"a": 1, "b": -1}, r"config.data.mixture.b.weight=-1: must be a number, 0 or more"),
        (two(), {"a": 0, "b": 0.0}, "all weights are 0"),
        (two(), {"a": 1, "c": 1}, "config.data.mixture.b: has no weight"),
        (two(), {"a": 1, "b": 1, "bb": 1}, "mixture.bb: has no source; did you mean 'b'"),
        (two(b=Numbers()), {"a": 1, "b": 1}, "mixture.b: is Numbers, and must be"),
        ({}, {}, "holds no source"),
        ({"a b": dataset()}, {"a b": 1}, "name must be letters"),
        (two(), {"a": True, "b": 1}, "must be a number"),
        (two(), {"a": float("nan"), "b": 1}, "must be a number"),
    ],
)
def test_a_mixture_that_cannot_be_is_named(sources, weights, message):
    with pytest.raises(ConfigError, match=message):
        mixture(sources, weights)


class Seedless(Task):
    make_model = loss = None

    def train_data(self, seed):
        return grain.MapDataset.range(9).random_map(noise)


def test_random_transformations_without_a_seed_are_named():
    Seedless.__abstractmethods__ = frozenset()
    with pytest.raises(ConfigError, match=r"uses random_map\(\) without a seed"):
        training_data(Seedless({}, {}), 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: {**e, "t": np.float64(time.perf_counter())},
        lambda e: {**e, "r": np.random.default_rng().integers(1 << 40)},
        lambda e: {**e, "n": next(CALLS)},
    ],
)
def test_what_differs_each_time_it_is_read_is_refused_at_the_start(change):
    with pytest.raises(ConfigError, match="is another one each time it is read"):
        Reader(dataset().map(change), 4, range(4), "data")


def test_data_in_another_order_is_not_gone_on_with_unless_asked():
    names = [f"file{i}" for i in range(40)]
    sizes = {name: i for i, name in enumerate(names)}
    before = Reader(training_order(Numbers(order=sizes.values()), 0), 4, range(4), "data")
    next(before)
    position = before.position()
    other = [sizes[name] for name in sorted(names, key=lambda name: name[::-1])]
    after = Reader(training_order(Numbers(order=other), 0), 4, range(4), "data")
    with pytest.raises(ConfigError, match=r"example . of the data is another one"):
        after.restore(position)
    (line,) = after.restore(position, other_data=True)
    assert "examples may come twice or not at all" in line
    longer = Reader(training_order(Numbers(61), 0), 4, range(4), "data")
    with pytest.raises(ConfigError, match="had 40 examples, and has 61 now"):
        longer.restore(position)


def test_floats_may_be_rounded_otherwise_on_another_machine():
    def with_floats(scale):
        return identify(dataset().map(lambda e: {"f": e["x"] * scale}), "data")

    assert difference(with_floats(0.1), with_floats(0.1 + 1e-9)) == ""
    assert "another one" in difference(with_floats(0.1), with_floats(0.2))


def test_weights_of_grains_own_mix_may_not_change():
    def mixed(weights):
        return identify(grain.MapDataset.mix([dataset(), dataset()], weights), "data")

    assert difference(mixed([1, 2]), mixed([1, 2])) == ""
    assert "mixes them, has changed" in difference(mixed([1, 2]), mixed([2, 1]))
