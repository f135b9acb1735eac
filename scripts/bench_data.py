#!/usr/bin/env python3
"""How many rows of tokens a second one process reads, against a plain numpy gather.

    python scripts/bench_data.py [--path=DIR_OR_FILE] [--pattern='*.py'] [--seq_len=512]
                                 [--batch=256] [--rounds=7] [--seconds=0.5] [--json]

Reads byte windows of a corpus (by default Python's own standard library) and an ArrayRecord file
of uint16 tokens made on the spot, through the trainer's own pipeline: shuffled, repeated, batched.
'direct' reads in the caller; 'prefetch' has a thread read ahead, as training does. The numpy gather
takes the same number of random windows from the same array and does nothing else. 'packed' are
documents of 200 tokens on average, in rows of the same length; 'mixture' is of two sources, 3 to 1;
'filtered' leaves out a tenth. Their index is made before the clock runs; how long that takes for
100,000 documents is printed too.

Each round measures every way once, in turn, so that a ratio compares like with like on a busy
machine; printed are the medians over the rounds of rows a second and of the ratio to the round's
own gather. Also: microseconds to put one batch onto 4 devices (`to_global`).

Goal: at least 30,000 rows of 512 tokens a second on one process. About 40 s.
"""

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trainer.data.filtering import filtered
from trainer.data.mixture import mixture
from trainer.data.packing import packed
from trainer.data.pipeline import BatchIterator, rows_of_process, to_global
from trainer.data.records import TokenDocuments, TokenRecords, write_token_records
from trainer.data.sources import ByteWindows, read_corpus, training_order

GOAL_ROWS_PER_SECOND = 30_000


def main() -> int:
    """Measure, print, and return 0 when the goal is met."""
    arguments = parse_arguments()
    start = time.perf_counter()
    corpus = read_corpus(arguments.path, arguments.pattern, exclude=("site-packages",))
    read_seconds = time.perf_counter() - start
    seq_len, batch = arguments.seq_len, arguments.batch
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "tokens.array_record")
        write_token_records(path, rng.integers(0, 50_000, (20_000, seq_len + 1)))
        windows = ByteWindows(corpus, seq_len, "train")
        gather = Gather(corpus.data, seq_len, batch, rng)
        ways = {"numpy gather": gather}
        iterators = []
        records = TokenRecords(path, seq_len)
        sources = {"bytes": training_order(windows, 0), "ArrayRecord": training_order(records, 0)}
        sources |= elastic(windows, records, directory, seq_len, rng)
        for name, source in sources.items():
            for how, threads in (("direct", 0), ("prefetch", 1)):
                iterator = BatchIterator(
                    source, batch, range(batch), num_threads=threads, num_prefetch=4 * threads
                )
                iterators.append(iterator)
                ways[f"{name}, {how}"] = iterator.__next__
        results = measure(ways, batch, arguments.rounds, arguments.seconds)
        for iterator in iterators:
            iterator.close()
    placing = placing_microseconds(batch, seq_len, arguments.rounds)
    report = {
        "corpus_bytes": len(corpus.data),
        "corpus_files": corpus.num_files,
        "corpus_read_seconds": read_seconds,
        "rows_per_second": {name: row["rows_per_second"] for name, row in results.items()},
        "ratio_to_plain": {name: row["to_plain"] for name, row in results.items()},
        "ratio_to_gather": {name: row["ratio"] for name, row in results.items()},
        "to_global_microseconds": placing,
        "plan_seconds": plan_seconds(seq_len, rng),
        "goal_rows_per_second": GOAL_ROWS_PER_SECOND,
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        show(report, seq_len, batch)
    met = report["rows_per_second"]["bytes, prefetch"] >= GOAL_ROWS_PER_SECOND
    return 0 if met else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default=sysconfig.get_paths()["stdlib"])
    parser.add_argument("--pattern", default="*.py")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="per way and round")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class Gather:
    """Random windows of an array, by one vectorised numpy index."""

    def __init__(self, data, seq_len, batch, rng):
        self.windows = np.lib.stride_tricks.sliding_window_view(data, seq_len + 1)
        self.starts = rng.integers(0, len(self.windows), (64, batch))
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.windows[self.starts[self.calls % 64]]


def elastic(windows, records, directory, seq_len, rng):
    """Filters, packing and mixtures over the same bytes and over records of documents."""
    path = os.path.join(directory, "documents.array_record")
    lengths = np.minimum(rng.geometric(1 / 200, 50_000), 4 * seq_len)
    documents = (rng.integers(0, 50_000, n) for n in lengths)
    write_token_records(path, documents, any_length=True)
    rows = packed(TokenDocuments(path), seq_len + 1, overlap=1, positions=False)
    slices = Slices(np.concatenate([[0], np.cumsum(lengths)]))
    of_memory = packed(slices, seq_len + 1, overlap=1, positions=False)

    def mixed(source):
        two = {"a": training_order(source, 1), "b": training_order(source, 2)}
        return mixture(two, {"a": 3, "b": 1})

    return {
        "bytes, mixture": mixed(windows),
        "bytes, filtered": training_order(filtered(windows, lambda e: e["tokens"][0] % 10 > 0), 0),
        "ArrayRecord, mixture": mixed(records),
        "ArrayRecord, packed": training_order(rows, 0),
        "ArrayRecord, packed mixture": mixed(rows),
        "bytes, packed": training_order(of_memory, 0),
    }


class Slices:
    """Documents in memory."""

    def __init__(self, ends):
        self.ends = ends
        self.tokens = np.zeros(ends[-1], np.uint16)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        return {"tokens": self.tokens[self.ends[index] : self.ends[index + 1]]}

    def lengths(self, indices):
        return np.diff(self.ends)[list(indices)]


def plan_seconds(seq_len, rng):
    """Seconds to plan the rows of 100,000 documents whose lengths are known."""
    lengths = np.minimum(rng.geometric(1 / 200, 100_000), 4 * seq_len)
    source = Slices(np.concatenate([[0], np.cumsum(lengths)]))
    start = time.perf_counter()
    packed(source, seq_len + 1, overlap=1)
    return time.perf_counter() - start


def measure(ways, batch, rounds, seconds):
    """Medians over rounds of each way's rows a second and of its ratio to the first way."""
    for read in ways.values():
        for _ in range(10):  # Fill the buffers, open the files.
            read()
    speeds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, read in ways.items():
            start, calls = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                read()
                calls += 1
            speeds[name].append(calls * batch / (time.perf_counter() - start))
    base = next(iter(speeds.values()))
    medians = {}
    for name, own in speeds.items():
        kind, _, how = name.rpartition(", ")
        # What filters, packing and mixtures cost: to the same source without them.
        plain = speeds.get(f"{kind.partition(',')[0]}, {how}", base)
        medians[name] = {
            "rows_per_second": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, base, strict=True)),
            "to_plain": statistics.median(a / b for a, b in zip(own, plain, strict=True)),
        }
    return medians


def placing_microseconds(batch, seq_len, rounds):
    """Median microseconds of `to_global` for one key on 4 devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rows = rows_of_process(sharding, batch)
    example = {"tokens": np.zeros((batch, seq_len + 1), np.uint8)}
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(100):
            to_global(example, sharding, rows, batch)
        times.append((time.perf_counter() - start) * 1e4)
    return statistics.median(times)


def show(report, seq_len, batch):
    print(
        f"corpus: {report['corpus_bytes']:,} bytes in {report['corpus_files']:,} files, "
        f"read in {report['corpus_read_seconds']:.2f} s"
    )
    title = f"rows of {seq_len} tokens, batches of {batch}"
    print(f"{title:40}{'rows/s':>12}{'of gather':>12}{'of plain':>12}")
    for name, speed in report["rows_per_second"].items():
        print(f"{name:40}{speed:12,.0f}{report['ratio_to_gather'][name]:12.3f}", end="")
        print(f"{report['ratio_to_plain'][name]:12.2f}")
    print(f"to_global, 1 key on 4 devices: {report['to_global_microseconds']:.0f} us")
    print(f"rows planned for 100,000 documents: {report['plan_seconds']:.2f} s")
    print(f"goal: {GOAL_ROWS_PER_SECOND:,} rows/s with prefetch")


if __name__ == "__main__":
    sys.exit(main())
