#!/usr/bin/env python
"""What a checkpoint costs: the time the training loop loses to a save, and a restore.

    PYTHONPATH=. python scripts/bench_checkpoint.py [--gigabytes=1] [--rounds=5] [--directory=/tmp]

Takes two to three minutes and twice the state in disk space, which it gives back.

Save. The state is donated to a step that reads and writes all of it, as an optimizer does, and
multiplies matrices for a while. A round is a pair: the steps from the call of `save` to the moment
the checkpoint is on the disk, the call included, and directly after it as many steps without a
save. What the loop lost is the difference: the call, and all that the steps paid for the copy and
for the writing beside them. Beside it stands a raw write (and fsync) of as many bytes, in the same
round: on a virtual machine the first touch of memory costs many times what it does later, and both
pay it. Goal: at most 0.3 s lost for 1 GB.

Restore. `Checkpointer.restore`, with every checksum verified and every array ready, against a raw
read of the same files into new memory, one after the other, both from a warm page cache; which of
them is first changes from round to round. Goal: a ratio of at most 1.3.

Prints medians and, in brackets, the lowest and the highest round.
"""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.spec import CheckpointSpec
from trainer.checkpoint import Checkpointer

LEAVES = 24
COLUMNS = 1024


def make_state(num_bytes: int) -> dict[str, jax.Array]:
    rows = num_bytes // (4 * LEAVES * COLUMNS)
    keys = jax.random.split(jax.random.key(0), LEAVES)
    return {f"layer{i}.kernel": jax.random.normal(keys[i], (rows, COLUMNS)) for i in range(LEAVES)}


def step(state: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Touch every byte of the state, and compute."""
    for _ in range(8):
        x = jnp.tanh(x @ x)
    return {name: 0.999 * leaf + 1e-3 for name, leaf in state.items()}, x


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def show(name: str, values: Sequence[float], unit: str, goal: str = "") -> None:
    middle = statistics.median(values)
    print(f"{name:38s} {middle:7.3f} {unit} [{min(values):.3f} .. {max(values):.3f}] {goal}")


def raw_write(path: pathlib.Path, data: np.ndarray) -> None:
    with open(path, "wb", buffering=0) as file:
        left = memoryview(data).cast("B")
        while left:
            left = left[file.write(left[: 2**26]) :]
        os.fsync(file.fileno())
    path.unlink()


def raw_read(directory: pathlib.Path) -> None:
    arrays = []
    for path in directory.rglob("*"):
        if path.is_file():
            array = np.empty(path.stat().st_size, np.uint8)
            with open(path, "rb", buffering=0) as file:
                left = memoryview(array)
                while left:
                    left = left[file.readinto(left) :]
            arrays.append(array)


def bench_save(directory: pathlib.Path, state: dict[str, jax.Array], rounds: int) -> pathlib.Path:
    """Save once per round, and print; returns the newest step's directory."""
    num_bytes = sum(leaf.nbytes for leaf in state.values())
    raw = np.ones(num_bytes, np.uint8)
    x = jnp.eye(1024)
    jitted = jax.jit(step, donate_argnums=0)

    def run(number: int) -> None:
        nonlocal state, x
        for _ in range(number):
            state, x = jax.block_until_ready(jitted(state, x))

    saver = Checkpointer(directory, CheckpointSpec(keep_last=1), config={})
    calls, losses, durables, cpus, raw_writes, steps = [], [], [], [], [], []
    for number in range(rounds + 1):
        run(5)
        start, cpu = time.perf_counter(), cpu_seconds()
        call = saver.save(number, state, None)
        beside = 0
        while saver.saving:
            run(1)
            beside += 1
            saver.check()
        durable, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        cpu += cpu_seconds()
        plain = timed(lambda count=beside: run(count))
        cpu -= cpu_seconds()
        saver.wait()
        raw_time = timed(lambda: raw_write(directory / "raw", raw))
        if number == 0:  # makes the snapshot, compiles, starts threads
            print(f"first save: call {call:.3f} s, lost {durable - plain:.3f} s")
            continue
        calls.append(call)
        losses.append(durable - plain)
        durables.append(durable)
        cpus.append(cpu)
        raw_writes.append(raw_time)
        steps.append(plain / beside)
    saver.close()
    show("step without a save", steps, "s")
    show("save: the call", calls, "s")
    show("save: lost, call and excess of steps", losses, "s", "goal <= 0.3 for 1 GB")
    show("save: CPU time of all threads", cpus, "s")
    show("save: until on the disk", durables, "s")
    show("raw write of as many bytes", raw_writes, "s")
    show("lost / raw write", [a / b for a, b in zip(losses, raw_writes, strict=True)], "x")
    return directory / str(rounds)


def bench_restore(
    path: pathlib.Path, abstract: dict[str, jax.ShapeDtypeStruct], rounds: int
) -> None:
    reader = Checkpointer(path.parent, CheckpointSpec(), config={})

    def restore() -> None:
        restored = reader.restore(abstract)
        assert restored is not None
        jax.block_until_ready(restored.state)

    restores, reads = [], []
    pair = [
        lambda: reads.append(timed(lambda: raw_read(path))),
        lambda: restores.append(timed(restore)),
    ]
    for number in range(rounds + 1):
        for call in pair if number % 2 else reversed(pair):
            call()
    restores, reads = restores[1:], reads[1:]
    show("restore, checksums verified", restores, "s")
    show("raw read of the same files", reads, "s")
    show(
        "restore / raw read",
        [a / b for a, b in zip(restores, reads, strict=True)],
        "x",
        "goal <= 1.3",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="on the file system to measure")
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="bench_checkpoint-", dir=args.directory))
    try:
        state = jax.block_until_ready(make_state(int(args.gigabytes * 10**9)))
        num_bytes = sum(leaf.nbytes for leaf in state.values())
        print(f"state: {num_bytes / 1e9:.2f} GB in {len(state)} leaves; {os.cpu_count()} cores")
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in state.items()
        }
        path = bench_save(directory, state, args.rounds)
        bench_restore(path, abstract, args.rounds)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
