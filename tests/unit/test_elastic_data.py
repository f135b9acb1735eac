"""The global batches are the same at any number of processes and across changes of it, through
filters, packing, mixtures, shuffles and changed weights; and every epoch has every example once."""

import collections
import json
import os
import random

import numpy as np
import pytest

from launch.spec import ConfigError
from trainer.data import index
from trainer.data.filtering import filtered
from trainer.data.mixture import mixture, source_seed
from trainer.data.packing import packed
from trainer.data.reader import Reader
from trainer.data.records import TokenRecords, write_token_records
from trainer.data.sources import training_order

ROW = 12
NUM_STEPS = 8


class Documents:
    """Document d of source s is s * 100,000 + d * 100 + 0, 1, 2, ..."""

    def __init__(self, source, lengths):
        self.source, self.sizes = source, lengths

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        tokens = np.arange(self.sizes[i], dtype=np.int32)
        return {"tokens": self.source * 100_000 + int(i) * 100 + tokens}

    def __repr__(self):
        return f"Documents({self.source}, {self.sizes})"


def is_kept(example):
    return int(example["tokens"][0] // 100) % 3 != 1


class Case:
    """A random pipeline; `make` builds it anew, as each process and each restart does."""

    def __init__(self, rng):
        self.num_sources, self.packing = rng.choice([1, 2, 3]), rng.random() < 0.6
        self.filters = [rng.random() < 0.5 for _ in range(3)]
        self.sources = []
        for number in range(self.num_sources):
            size = rng.randrange(60, 120)  # Grain shuffles tiny sources slowly.
            lengths = [rng.randrange(1, 30) if self.packing else ROW for _ in range(size)]
            self.sources.append(Documents(number, lengths))
        self.seed = rng.randrange(1000)
        self.batch_size = rng.choice([4, 8, 16])
        self.num_prefetch = rng.choice([0, 0, 2])

    def rows(self, number):
        source = self.sources[number]
        source = filtered(source, is_kept) if self.filters[number] else source
        return packed(source, ROW) if self.packing else source

    def make(self, weights):
        if self.num_sources == 1:
            return training_order(self.rows(0), self.seed)
        sources = {
            f"s{n}": training_order(self.rows(n), source_seed(self.seed, f"s{n}"))
            for n in range(self.num_sources)
        }
        return mixture(sources, weights)

    def tokens_of(self, number):
        """What an epoch of a source must hold."""
        examples = [self.sources[number][i] for i in range(len(self.sources[number]))]
        kept = [e for e in examples if not self.filters[number] or is_kept(e)]
        return collections.Counter(t for e in kept for t in e["tokens"].tolist())


def random_weights(rng, case):
    weights = {f"s{n}": rng.choice([0.0, 0.1, 1.0, rng.random()]) for n in range(case.num_sources)}
    return weights if any(weights.values()) else {**weights, "s0": 1.0}


def read_run(case, plan, num_steps):
    """Global batches of a run that goes on with other processes, weights and batch sizes.

    Args:
      plan: (first step, number of processes, weights) of each attempt.
    """
    batches, position = [], None
    ends = [start for start, _, _ in plan[1:]] + [num_steps]
    for (start, num_processes, weights), end in zip(plan, ends, strict=True):
        parts, positions = [], []
        for rows in np.array_split(np.arange(case.batch_size), num_processes):
            reader = Reader(
                case.make(weights), case.batch_size, rows, "data", num_prefetch=case.num_prefetch
            )
            if position is not None:
                reader.restore(json.loads(position))
            parts.append([next(reader) for _ in range(end - start)])
            positions.append(json.dumps(reader.position()))
            reader.close()
        assert len(set(positions)) == 1  # Whoever writes it.
        position = positions[0]
        for step in range(end - start):
            batches.append(
                {key: np.concatenate([part[step][key] for part in parts]) for key in parts[0][0]}
            )
    return batches


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("number", range(14))
def test_any_interruption_and_any_number_of_processes_gives_the_same_global_batches(
    number, tmp_path
):
    rng = random.Random(number)
    case = Case(rng)
    index.keep_in(tmp_path if number % 2 else None)
    try:
        changes = sorted(rng.sample(range(1, NUM_STEPS), rng.choice([0, 1, 3])))
        weights = [random_weights(rng, case) for _ in range(len(changes) + 1)]
        alone = [(start, 1, w) for start, w in zip([0, *changes], weights, strict=True)]
        # The same changes of weights, and more interruptions, at other numbers of processes.
        divisors = [n for n in range(1, 17) if case.batch_size % n == 0]
        starts = sorted({0, *changes, *rng.sample(range(NUM_STEPS), 2)})
        plan = []
        for start in starts:
            current = [w for first, _, w in alone if first <= start][-1]
            plan.append((start, rng.choice(divisors), current))
        assert_same(read_run(case, plan, NUM_STEPS), read_run(case, alone, NUM_STEPS))
    finally:
        index.keep_in(None)


@pytest.mark.parametrize("number", range(4))
def test_every_epoch_of_every_source_has_each_of_its_examples_once(number):
    rng = random.Random(100 + number)
    case = Case(rng)
    steps = 800 // case.batch_size
    plan = [(0, 1, random_weights(rng, case)), (steps // 2, 2, random_weights(rng, case))]
    batches = read_run(case, plan, steps)
    rows = [
        dict(zip(b, values, strict=True))
        for b in batches
        for values in zip(*b.values(), strict=True)
    ]
    for source in range(case.num_sources):
        own = [row["tokens"] for row in rows if int(row["tokens"][0]) // 100_000 == source]
        length = len(case.rows(source))
        for epoch in range(len(own) // length):
            found = np.concatenate(own[epoch * length : (epoch + 1) * length])
            counted = collections.Counter(found.tolist())
            counted[0] = 1 if source == 0 and case.tokens_of(0)[0] else 0  # Else padding.
            assert +counted == case.tokens_of(source)
        if length * 2 <= len(own):
            assert [r.tolist() for r in own[:length]] != [r.tolist() for r in own[length:][:length]]


def test_a_change_of_weights_takes_effect_at_its_step_and_no_source_starts_again_or_skips():
    sources = {name: Documents(i, [1] * 1000) for i, name in enumerate(("a", "b"))}

    def make(weights):
        return mixture({k: training_order(s, 0) for k, s in sources.items()}, weights)

    first = Reader(make({"a": 3, "b": 1}), 8, range(8), "data")
    before = [next(first)["tokens"] // 100_000 for _ in range(5)]
    second = Reader(make({"a": 1, "b": 1}), 8, range(8), "data")
    lines = second.restore(first.position())
    assert lines == ["data: the mixture changes at example 40: a 3 -> 1"]
    after = [next(second)["tokens"] for _ in range(5)]
    assert [int(batch.sum()) for batch in before] == [2] * 5  # Two of b, six of a.
    assert [int((batch // 100_000).sum()) for batch in after] == [4] * 5
    own = {name: training_order(source, 0) for name, source in sources.items()}
    of_a = np.concatenate([b[b // 100_000 == 0] for b in after])
    of_b = np.concatenate([b[b // 100_000 == 1] for b in after])
    np.testing.assert_array_equal(of_a, [own["a"][30 + i]["tokens"][0] for i in range(20)])
    np.testing.assert_array_equal(of_b, [own["b"][10 + i]["tokens"][0] for i in range(20)])
    third = Reader(make({"a": 1, "b": 1}), 8, range(8), "data")
    assert third.restore(second.position()) == []


def test_a_source_comes_into_a_mixture_goes_out_and_comes_back_where_it_stood():
    sources = {name: Documents(i, [1] * 50) for i, name in enumerate(("a", "b"))}

    def make(**weights):
        return mixture({k: training_order(sources[k], 0) for k in weights}, weights)

    def go_on(weights, position, steps):
        reader = Reader(make(**weights), 4, range(4), "data")
        lines = reader.restore(position) if position else []
        return [next(reader)["tokens"] for _ in range(steps)], reader.position(), lines

    _, position, _ = go_on({"a": 1}, None, 3)
    both, position, lines = go_on({"a": 1, "b": 1}, position, 2)
    assert lines == ["data: the mixture changes at example 12: b 1 (new)"]
    _, position, lines = go_on({"a": 1}, position, 2)
    assert lines == ["data: the mixture changes at example 20: b taken out after 4 examples"]
    back, position, lines = go_on({"a": 1, "b": 1}, position, 1)
    assert lines == ["data: the mixture changes at example 28: b 1 (new, goes on at its 4th)"]
    order = training_order(sources["b"], 0)
    of_b = np.concatenate([batch[batch >= 100_000] for batch in [*both, *back]])
    np.testing.assert_array_equal(of_b, [order[i]["tokens"][0] for i in range(6)])
    sources["b"] = Documents(1, [1] * 51)
    with pytest.raises(ConfigError, match="source 'b' had 50 examples, and has 51 now"):
        go_on({"a": 1, "b": 1}, position, 1)


def test_another_batch_size_goes_on_in_a_mixture_where_it_is_whole():
    def reader(size, weights):
        sources = {n: training_order(Documents(i, [1] * 30), i) for i, n in enumerate("ab")}
        return Reader(mixture(sources, weights), size, range(size), "data")

    small = reader(4, {"a": 2, "b": 1})
    for _ in range(6):
        next(small)
    wanted = np.concatenate([next(small)["tokens"] for _ in range(2)])
    large = reader(8, {"a": 2, "b": 1})
    large.restore({**small.position(), "next_index": 6})
    np.testing.assert_array_equal(next(large)["tokens"], wanted)
    with pytest.raises(ConfigError, match="no whole number of batches of 16"):
        reader(16, {"a": 2, "b": 1}).restore({**small.position(), "next_index": 6})


def test_eight_processes_read_three_files_and_open_those_that_they_read_from(tmp_path):
    for number in range(3):
        rows = np.arange(number * 40, number * 40 + 40)[:, None] + np.zeros(9, int)
        write_token_records(str(tmp_path / f"{number}.array_record"), rows)

    def files_open():
        paths = [
            os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink()
        ]
        return sum(path.startswith(str(tmp_path)) for path in paths)

    parts, readers = [], []
    for process in range(8):
        source = TokenRecords(str(tmp_path), 8)  # Each process opens its own.
        rows = [2 * process, 2 * process + 1]
        readers.append(Reader(training_order(source, 0), 16, rows, "data", num_prefetch=0))
        parts.append([next(readers[-1])["tokens"][:, 0] for _ in range(15)])
        assert files_open() == 3 * (process + 1)
    found = np.concatenate(np.concatenate(parts, axis=1)[:15])
    assert sorted(found[:120].tolist()) == sorted(found[120:].tolist()) == list(range(120))
    order = training_order(TokenRecords(str(tmp_path), 8), 0)
    assert found.tolist() == [int(order[i]["tokens"][0]) for i in range(240)]


def test_positions_of_before_there_were_mixtures_are_good():
    old = Reader(training_order(Documents(0, [1] * 9), 0), 4, range(4), "data")
    old.restore({"next_index": 2, "global_batch_size": 4})
    assert old.position()["next_index"] == 2
    mixed = mixture({"a": training_order(Documents(0, [1] * 9), 0)}, {"a": 1})
    with pytest.raises(ConfigError, match=r"config.data.mixture: .* no mixture"):
        Reader(mixed, 4, range(4), "data").restore({"next_index": 2, "global_batch_size": 4})
    reader = Reader(mixed, 4, range(4), "data")
    next(reader)
    with pytest.raises(ConfigError, match="was a mixture of a, and is none now"):
        old.restore({**reader.position(), "data": {}})
    # The user may have named it.
    assert old.restore({**reader.position(), "data": {}}, other_data=True) == []
    place = {"next_index": 2, "global_batch_size": 4}
    assert Reader(mixed, 4, range(4), "data").restore(place, other_data=True) == []
