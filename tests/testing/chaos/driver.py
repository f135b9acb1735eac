"""A whole trial: the run without faults, the run with them, and what is to be said of it."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import contract
from tests.testing.chaos import judge, schedule, storage
from tests.testing.chaos.deliver import Deliverer, Delivery
from tests.testing.chaos.world import World
from tests.testing.gangs import environment

_BY_US = (-signal.SIGKILL, -signal.SIGTERM, contract.EXIT_RESUMABLE)


@dataclasses.dataclass(frozen=True)
class Trial:
    """How it went.

    Attributes:
      faults: the schedule.
      deliveries: of them, in order.
      wrong: everything that is not as it must be, in words; none if all is well.
      causes: how the attempts ended, in order.
      gave_up: how often `muster run` ended by itself, and had to be started again by hand.
      starts: of `muster run`.
      steps, steps_lost: of the run; those done again.
      reference_seconds, seconds: of the run without and with faults.
      cpu_seconds: of all processes of both, which a busy machine does not change much.
      goodput: the run's own record of its time (`muster status --json`).
    """

    faults: list[schedule.Fault]
    deliveries: list[Delivery]
    wrong: list[str]
    causes: list[str]
    gave_up: int
    starts: int
    steps: int
    steps_lost: int
    reference_seconds: float
    seconds: float
    cpu_seconds: float
    goodput: dict[str, Any]


def run_trial(
    folder: Path, seed: int, num_faults: int, tell: Callable[[str], None] = print
) -> Trial:
    """Run it all; nothing of it is left running.

    Args:
      folder: where; new files stay there, and the run's records in `records`.
      seed, num_faults: of the schedule.
      tell: hears what happens, a line at a time.
    """
    mounts = storage.may_mount()
    if not mounts:
        tell(f"no mounts here: without {' and '.join(schedule.NEEDS_MOUNTS)}")
    faults = schedule.make_schedule(seed, num_faults, mounts)
    steps = schedule.num_steps(num_faults)
    reference = World(folder / "reference", steps, folder)
    world = World(folder / "chaos", steps, folder, most_ends=20 + num_faults)
    try:
        reference_seconds = _run_reference(reference)
        tell(f"{steps} steps without faults: {reference_seconds:.1f} s")
        deliveries: list[Delivery] = []
        began = time.monotonic()
        wrong = []
        try:
            _deliver_all(world, faults, deliveries, tell)
        except AssertionError as error:
            wrong.append(str(error))
        seconds = time.monotonic() - began
        wrong = wrong or judge.differences(reference.run, world.run, steps)
        wrong += judge.wrong_ends(world, deliveries)
        return Trial(
            faults=faults,
            deliveries=deliveries,
            wrong=wrong,
            causes=[record.get("cause") or "none" for record in world.records()],
            gave_up=sum(end.code not in _BY_US for end in world.ended),
            starts=world.starts,
            steps=steps,
            steps_lost=judge.steps_lost(world.run),
            reference_seconds=reference_seconds,
            seconds=seconds,
            cpu_seconds=_cpu_seconds(),
            goodput=_goodput(world),
        )
    finally:
        kept = folder / "records"
        shutil.copytree(world.run, kept, ignore=shutil.ignore_patterns(contract.CHECKPOINTS))
        world.close()
        reference.close()


def _run_reference(world: World) -> float:
    """Run to the end without faults; the seconds that it took."""
    began = time.monotonic()
    world.start()
    world.finish()
    return time.monotonic() - began


def _deliver_all(
    world: World,
    faults: list[schedule.Fault],
    deliveries: list[Delivery],
    tell: Callable[[str], None],
) -> None:
    """Run to the end, with all faults; `deliveries` gets what has happened."""
    began = time.monotonic()
    world.open_gate(0)
    world.start()
    deliverer = Deliverer(world)
    for fault in faults:
        done = deliverer.deliver(fault)
        deliveries.append(done)
        seconds = time.monotonic() - began
        tell(f"{seconds:6.1f} s  attempt {done.attempts[0]}, {done.phase}: {fault}")
    world.finish()


def _cpu_seconds() -> float:
    """Of everything that this process has started and seen the end of, and what that has."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _goodput(world: World) -> dict[str, Any]:
    """What `muster status` says of the run's time."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", "status", str(world.run), "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout or "{}").get("goodput") or {}
