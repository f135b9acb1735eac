"""The global batches are the same whatever reads them, and go on exactly where they stopped."""

import time

import grain
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from launch.spec import ConfigError
from trainer.data.pipeline import BatchIterator, rows_of_process, to_global
from trainer.data.sources import fixed_order, training_order

BATCH = 8


class Numbers:
    """Example i is {'x': [i, i * i]}."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"x": np.array([index, index * index])}


def augmented(seed=0, length=20):
    """A dataset as users write them, with everything random that Grain has per example."""
    ordered = training_order(Numbers(length), seed)
    return ordered.map(lambda e: {"x": e["x"] * 2}).random_map(
        lambda e, rng: {**e, "noise": rng.integers(0, 1 << 30)}
    )


def read(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def examples_of(dataset, step):
    examples = [dataset[step * BATCH + row] for row in range(BATCH)]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def test_global_batch_n_is_examples_n_times_b_to_n_plus_1_times_b():
    dataset = augmented()
    assert_same(
        read(BatchIterator(dataset, BATCH, range(BATCH)), 6),
        [examples_of(dataset, step) for step in range(6)],
    )


@pytest.mark.parametrize(
    "rows_of_each",
    [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 1, 4, 5], [2, 3, 6, 7]],  # Not contiguous, as with data over fsdp over processes.
        [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]],  # A tensor axis across processes.
        [list(range(8)), list(range(8))],
    ],
)
def test_every_process_reads_its_rows_of_the_one_global_batch(rows_of_each):
    dataset = augmented()
    for rows in rows_of_each:
        part = read(BatchIterator(augmented(), BATCH, rows), 6)
        whole = [examples_of(dataset, step) for step in range(6)]
        assert_same(part, [{k: v[rows] for k, v in batch.items()} for batch in whole])


@pytest.mark.parametrize("num_prefetch", [0, 1, 5])
@pytest.mark.parametrize("rows", [range(BATCH), [2, 3, 6, 7]])
def test_resume_is_exact_and_counts_batches_handed_out_not_read_ahead(num_prefetch, rows):
    straight = BatchIterator(augmented(), BATCH, rows, num_prefetch=num_prefetch)
    before = read(straight, 4)
    time.sleep(0.01)  # Let the threads read ahead.
    position = straight.position()
    assert position == {"next_index": 4, "global_batch_size": BATCH}
    after = read(straight, 4)
    straight.close()

    other_threads = BatchIterator(augmented(), BATCH, rows, num_threads=2, num_prefetch=3)
    read(other_threads, 2)
    other_threads.restore(position)
    assert other_threads.position() == position
    assert_same(read(other_threads, 4), after)
    other_threads.restore({"next_index": 0})
    assert_same(read(other_threads, 4), before)
    other_threads.close()


def test_position_saved_with_another_batch_size_holds_where_it_is_whole():
    iterator = BatchIterator(augmented(), 4, range(4))
    iterator.restore({"next_index": 3, "global_batch_size": BATCH})
    np.testing.assert_array_equal(next(iterator)["x"], examples_of(augmented(), 3)["x"][:4])
    iterator = BatchIterator(augmented(), 16, range(16))
    with pytest.raises(ConfigError, match=r"global_batch_size=16: 3 batches of 8 .* keep 8"):
        iterator.restore({"next_index": 3, "global_batch_size": BATCH})


def test_every_epoch_is_another_permutation_and_seeds_differ():
    def epoch(seed, number):
        ordered = training_order(Numbers(100), seed)
        return tuple(int(ordered[number * 100 + i]["x"][0]) for i in range(100))

    epochs = [epoch(seed, number) for seed in (0, 1) for number in range(3)]
    assert all(sorted(order) == list(range(100)) for order in epochs)
    assert len({*epochs, tuple(range(100))}) == 7
    assert epoch(1, 1) == epochs[4]


def test_resuming_far_into_training_costs_nothing():
    iterator = BatchIterator(augmented(), BATCH, range(BATCH), num_prefetch=0)
    iterator.restore({"next_index": 10**12})
    assert_same([next(iterator)], [examples_of(augmented(), 10**12)])


def test_evaluation_is_one_pass_over_whole_batches_and_can_begin_again():
    iterator = BatchIterator(fixed_order(Numbers(20)), BATCH, [1, 2], endless=False)
    assert iterator.num_batches == 2
    first = list(iterator)
    np.testing.assert_array_equal([batch["x"][:, 0] for batch in first], [[1, 2], [9, 10]])
    assert list(iterator) == []
    iterator.restore({"next_index": 0})
    assert_same(list(iterator), first)


def test_end_of_training_data_says_how_far_it_goes():
    iterator = BatchIterator(fixed_order(Numbers(20)), BATCH, range(BATCH))
    read(iterator, 2)
    with pytest.raises(ConfigError, match=r"config.num_steps: .* ends after 2 global batches of 8"):
        next(iterator)
    with pytest.raises(ConfigError, match=r"3 global batches were read before, .* only 2"):
        iterator.restore({"next_index": 3})


def test_wait_seconds_count_what_next_takes():
    def slow(example):
        time.sleep(0.005)
        return example

    iterator = BatchIterator(
        fixed_order(Numbers(20)).map(slow), BATCH, range(BATCH), num_prefetch=0
    )
    assert iterator.wait_seconds == 0
    next(iterator)
    assert iterator.wait_seconds >= BATCH * 0.005


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda: fixed_order(Numbers(7)), r"global_batch_size=8: .* has 7 examples, fewer than"),
        (lambda: fixed_order(Numbers(0)), r"global_batch_size=8: .* has 0 examples"),
        (
            lambda: fixed_order(Numbers(20)).filter(lambda e: True).map(lambda e: e),
            r"config.task: .* uses filter\(\), .* weight of 0",
        ),
        (lambda: fixed_order(Numbers(20)).to_iter_dataset(), r"must be a grain.MapDataset"),
    ],
)
def test_datasets_that_cannot_be_read_by_position_are_refused(dataset, message):
    with pytest.raises(ConfigError, match=message):
        BatchIterator(dataset(), BATCH, range(BATCH))


def test_empty_source_is_refused_in_training_order():
    with pytest.raises(ConfigError, match="no examples"):
        training_order(Numbers(0), seed=0)
    with pytest.raises(ConfigError, match=r"config.seed=-1"):
        training_order(Numbers(5), seed=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: None if e["x"][0] == 5 else e, "example 5 of the dataset is None"),
        (lambda e: e["x"], "example 0 .* is ndarray, and must be a dict"),
        (lambda e: {"x": np.zeros(2 + e["x"][0] // 3)}, r"example 3 .*\(3,\).* example 0 has .*2,"),
        (lambda e: {"x": 1} if e["x"][0] < 6 else {"x": 1, "y": 1}, "example 6 .* must be shaped"),
        (lambda e: {"x": "text"}, "'x' .* is <U4, which is no number"),
    ],
)
def test_examples_that_do_not_stack_are_named(change, message):
    iterator = BatchIterator(fixed_order(Numbers(20)).map(change), BATCH, range(BATCH))
    with pytest.raises(ValueError, match=message):
        next(iterator)


def test_after_a_failed_read_no_later_batch_is_taken_for_it():
    def fail_once(example, failed=[]):  # noqa: B006 (one list for all calls is the point)
        if not failed:
            failed.append(True)
            raise OSError("disk gone")
        return example

    iterator = BatchIterator(fixed_order(Numbers(20)).map(fail_once), BATCH, range(BATCH))
    with pytest.raises(OSError, match="disk gone"):
        next(iterator)
    with pytest.raises(RuntimeError, match="failed before"):
        next(iterator)
    iterator.restore({"next_index": 0})
    np.testing.assert_array_equal(next(iterator)["x"][:, 0], range(BATCH))


@pytest.mark.parametrize("rows", [[], [1, 0], [3, 8], [-1, 2], [1, 1]])
def test_rows_must_be_sorted_positions_in_the_batch(rows):
    with pytest.raises(ValueError, match="sorted positions below 8"):
        BatchIterator(fixed_order(Numbers(20)), BATCH, rows)


def batch_sharding(shape=(1, 1), spec=("data",)):
    mesh = jax.make_mesh(
        shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )
    return NamedSharding(mesh, PartitionSpec(spec))


def test_rows_become_a_global_array_under_a_transfer_guard():
    sharding = batch_sharding()
    rows = rows_of_process(sharding, BATCH)
    np.testing.assert_array_equal(rows, range(BATCH))
    batch = next(BatchIterator(augmented(), BATCH, rows))
    with jax.transfer_guard("disallow"):
        arrays = to_global(batch, sharding, rows, BATCH)
    assert arrays["x"].shape == (BATCH, 2)
    assert arrays["noise"].sharding == sharding
    assert_same([{k: np.asarray(v) for k, v in arrays.items()}], [batch])


def test_rows_that_a_device_needs_must_be_there():
    with pytest.raises(ValueError, match="needs rows 0 to 8"):
        to_global({"x": np.zeros(4)}, batch_sharding(), np.arange(4), BATCH)


def test_a_task_may_bring_any_map_dataset_of_grain():
    ranges = grain.MapDataset.range(64).seed(1).shuffle().repeat().map(lambda i: {"x": i})
    batch = next(BatchIterator(ranges, BATCH, [1, 3]))
    np.testing.assert_array_equal(batch["x"], [ranges[1]["x"], ranges[3]["x"]])
