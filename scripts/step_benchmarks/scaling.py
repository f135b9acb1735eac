"""Two processes of one core each against one process on one core."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys

import jax
import optax
from jax.experimental import multihost_utils

from launch.spec import MeshSpec
from step_benchmarks.measure import (
    BATCH,
    LENGTH,
    Loop,
    Seconds,
    Trained,
    in_turns,
    language_model,
    report,
    some_tokens,
)
from trainer.mesh import make_mesh


def bench_scaling(rounds: int) -> None:
    """Start two members, each pinned to a core of its own, and show what the first prints."""
    # So that the members are ended too; by itself Python would be gone at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("scaling: not run, it needs two cores")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, sys.argv[0], f"--rounds={rounds}"]
    members = [
        subprocess.Popen([*command, f"--member={place},{cores[place]},{port}"])
        for place in range(2)
    ]
    try:
        for member in members:
            member.wait(timeout=600)
    finally:
        for member in members:
            member.kill()


def scaling_member(member: str, rounds: int) -> None:
    """One of two processes: measure alone (the first only) and together, in turns."""
    place, core, port = (int(part) for part in member.split(","))
    os.sched_setaffinity(0, {core})  # Before XLA counts the cores for its threads.
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, place, initialization_timeout=60)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    task = language_model()

    def loop(name: str, devices: list[jax.Device], at_once: bool) -> Loop:
        mesh = make_mesh(MeshSpec(data=len(devices)), devices)
        tokens = some_tokens(BATCH * len(devices), mesh)
        return Trained(task, tx, mesh).loop(name, tokens, one_all_reduce=at_once)

    alone = loop("1 x 1", jax.local_devices(), False)
    flat = loop("2 x 1, one all-reduce", jax.devices(), True)
    tuple_ = loop("2 x 1, XLA's all-reduces", jax.devices(), False)

    def only_first(steps: int) -> Seconds:
        seconds = alone.run(steps) if place == 0 else Seconds(1.0, 1.0)
        multihost_utils.sync_global_devices("alone")
        return seconds

    times = in_turns([only_first, alone.run, flat.run, tuple_.run], rounds, steps=2)
    if place == 0:
        # As if it did the work of both. CPU time leaves out the waiting for one another.
        single = [Seconds(2 * seconds.wall, 2 * seconds.cpu) for seconds in times[0]]
        tokens_per_second = 2 * BATCH * LENGTH / statistics.median(s.wall for s in single)
        print(f"scaling: 1 x 1: {tokens_per_second:.0f} tokens/s")
        report("scaling", "2 x 1 that do not talk (the machine's limit)", single, times[1], "-")
        report("scaling", "2 x 1, one all-reduce", single, times[2], "at least 1.86")
        report("scaling", "2 x 1, XLA's all-reduces", single, times[3], "-")
