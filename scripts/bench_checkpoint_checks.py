#!/usr/bin/env python
"""What the checks of a checkpoint cost: digests of leaves and checksums of files.

    PYTHONPATH=. python scripts/bench_checkpoint_checks.py [--gigabytes=1] [--rounds=5]
        [--directory=/tmp]

Takes two minutes and twice the state in disk space, which it gives back.

A round is a pair: the same with the leaves' digests and without them, one directly after the other,
and which of them is first changes from round to round. What is compared:

Save: seconds in which `Checkpointer.save` holds the loop up.
Durable: seconds until the step is on the disk; here the files' checksums are taken in both.
Restore: `Checkpointer.restore` until every array is ready, from a warm page cache; without checks
at all (Orbax alone), with the files' checksums, and with the leaves' digests besides.

Prints medians of the pairs' ratios and, in brackets, the lowest and the highest.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax

from launch.spec import CheckpointSpec
from trainer import checkpoint_choice, device_digest
from trainer.checkpoint import Checkpointer

LEAVES = 24
COLUMNS = 1024


def make_state(num_bytes: int) -> dict[str, jax.Array]:
    rows = num_bytes // (4 * LEAVES * COLUMNS)
    keys = jax.random.split(jax.random.key(0), LEAVES)
    return {f"layer{i}.kernel": jax.random.normal(keys[i], (rows, COLUMNS)) for i in range(LEAVES)}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def show(name: str, seconds: Sequence[float], ratios: Sequence[float] = ()) -> None:
    line = f"{name:34s} {statistics.median(seconds):7.3f} s"
    if ratios:
        low, high = min(ratios), max(ratios)
        line += f"   {statistics.median(ratios):.2f} x without [{low:.2f} .. {high:.2f}]"
    print(line, flush=True)


def no_digests() -> Any:
    return mock.patch.object(device_digest, "digests", return_value={})


def no_checksums() -> Any:
    return mock.patch.object(checkpoint_choice, "problem_of", return_value=None)


def bench_save(directory: pathlib.Path, state: dict[str, jax.Array], rounds: int) -> None:
    saver = Checkpointer(directory, CheckpointSpec(keep_last=1), config={})
    held: dict[bool, list[float]] = {True: [], False: []}
    durable: dict[bool, list[float]] = {True: [], False: []}
    digests: list[float] = []
    step = 0

    def save() -> tuple[float, float]:
        nonlocal step
        step += 1
        start = time.perf_counter()
        call = saver.save(step, state, None)
        saver.wait()
        return call, time.perf_counter() - start

    for number in range(rounds + 1):
        for on in (True, False) if number % 2 else (False, True):
            if on:
                call, whole = save()
            else:
                with no_digests():
                    call, whole = save()
            if number:  # The first round makes the snapshot and compiles.
                held[on].append(call)
                durable[on].append(whole)
        digests.append(timed(lambda: device_digest.digests(state)))
    saver.save(step + 1, state, None)  # The last step must have digests, for the restores.
    saver.close()
    show("leaves' digests alone", digests[1:])
    for name, found in (("save: the loop held up", held), ("save: until on the disk", durable)):
        pairs = zip(found[True], found[False], strict=True)
        show(f"{name}, without", found[False])
        show(f"{name}, with", found[True], [a / b for a, b in pairs])


def bench_restore(directory: pathlib.Path, state: dict[str, jax.Array], rounds: int) -> None:
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in state.items()
    }
    reader = Checkpointer(directory, CheckpointSpec(), config={})

    def restore() -> Any:
        restored = reader.restore(abstract)
        assert restored is not None
        return restored.state

    def bare() -> float:
        with no_digests(), no_checksums():
            return timed(restore)

    def files() -> float:
        with no_digests():
            return timed(restore)

    ways = {
        "Orbax alone": bare,
        "files' checksums": files,
        "and leaves' digests": lambda: timed(restore),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else reversed(list(ways)):
            seconds = ways[name]()
            if number:
                found[name].append(seconds)
    base = found["Orbax alone"]
    show("restore: Orbax alone", base)
    for name in list(ways)[1:]:
        ratios = [a / b for a, b in zip(found[name], base, strict=True)]
        show(f"restore: {name}", found[name], ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="on the file system to measure")
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="bench_checks-", dir=args.directory))
    try:
        state = jax.block_until_ready(make_state(int(args.gigabytes * 10**9)))
        size = sum(leaf.nbytes for leaf in state.values())
        print(f"state: {size / 1e9:.2f} GB in {len(state)} leaves", flush=True)
        bench_save(directory, state, args.rounds)
        bench_restore(directory, state, args.rounds)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
