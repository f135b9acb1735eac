"""What is to be said of a run after its faults: is it the same run, and are the causes right?"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch import contract, rundir
from tests.testing import tiny
from tests.testing.chaos.deliver import Delivery
from tests.testing.chaos.schedule import NEEDS_MOUNTS
from tests.testing.chaos.world import World
from tests.testing.gangs import members_of

# Kind of a fault -> the causes that an attempt may end with because of it.
_CAUSES = {
    "kill process": ("killed",),
    "kill agent": ("host_lost",),
    "kill launcher": ("killed",),
    # Before there is a gang that could agree on a step, the signal does what it does.
    "ask process to stop": ("preempted", "killed"),
    # Where there was time for it, they saved.
    "ask agent to stop": ("host_lost", "preempted"),
    "ask launcher to stop": ("stopped",),
    "freeze process": ("hang",),
    # The latter if it is still so when the next attempt looks whether it can save.
    "disk full": ("exception", "config"),
    "read-only": ("exception", "config"),
}
_BY_PROCESS = ("kill process", "freeze process")
_COMPARED_METRICS = ("loss", "grad_norm", "learning_rate")


def differences(reference: Path, run: Path, num_steps: int) -> list[str]:
    """In what two finished runs differ: every leaf of the last checkpoint, and metrics by step."""
    found = []
    states = [tiny.read_state(path, num_steps) for path in (reference, run)]
    if list(states[0]) != list(states[1]):
        found.append(f"leaves: {sorted(set(states[0]) ^ set(states[1]))}")
    for name in states[0].keys() & states[1].keys():
        first, second = states[0][name], states[1][name]
        if first.dtype != second.dtype or first.tobytes() != second.tobytes():
            apart = np.count_nonzero(first != second)
            found.append(f"{name}: {apart} of {first.size} values differ")
    expected = tiny.fingerprint(num_steps, batch_size=16)
    if int(states[1]["model.seen"]) != expected:
        found.append("rows: not those of the data in their order")
    metrics = [_metrics(path) for path in (reference, run)]
    for lines in metrics:
        if [step for step, *_ in lines] != list(range(1, num_steps + 1)):
            found.append(f"metrics: {len(lines)} steps, from {lines[0][0]} to {lines[-1][0]}")
    for first, second in zip(*metrics, strict=False):
        if first != second:
            found.append(f"metrics: {first} and {second}")
            break
    return found


def _metrics(run: Path) -> list[tuple[Any, ...]]:
    """The step of each line, and what must not differ there."""
    lines = (run / contract.METRICS_FILE).read_text().splitlines()
    return [
        tuple(line[name] for name in ("step", *_COMPARED_METRICS))
        for line in map(json.loads, lines)
    ]


def torn_records(run: Path) -> list[str]:
    """Records that are not whole. Progress is written in place, and another matter."""
    torn = []
    for path in run.rglob("*.json"):
        if path.name.endswith("progress.json") or path.is_relative_to(run / contract.CHECKPOINTS):
            continue
        try:
            whole = isinstance(json.loads(path.read_text()), dict)
        except ValueError:
            whole = False
        if not whole:
            torn.append(str(path.relative_to(run)))
    return torn


def wrong_ends(world: World, deliveries: Sequence[Delivery]) -> list[str]:
    """What no fault explains: ends of attempts and of `muster run`; records that are not whole."""
    wrong = wrong_causes(world.records(), deliveries)
    came = collections.Counter(delivery.fault.kind for delivery in deliveries)
    # Asked while Python was still starting, it just ends.
    ours = {-9: came["kill launcher"], contract.EXIT_RESUMABLE: came["ask launcher to stop"]}
    for end in world.ended:
        code = contract.EXIT_RESUMABLE if end.code == -15 else end.code
        if ours.get(code, 0) > 0:
            ours[code] -= 1
        elif not any(_met(d, end.attempt) for d in deliveries if d.fault.kind in NEEDS_MOUNTS):
            wrong.append(f"muster run ended with {end.code}: {end.last_words[-600:]}")
    wrong += [f"left running: process {pid}" for pid in members_of(world.run)]
    return wrong + [f"torn: {name}" for name in torn_records(world.run)]


def wrong_causes(records: Sequence[Mapping[str, Any]], deliveries: Sequence[Delivery]) -> list[str]:
    """Attempts whose recorded end no fault explains."""
    wrong = []
    for record in records[:-1]:
        number, cause = record["attempt"], record.get("cause")
        met = [d for d in deliveries if d.fault.kind in _CAUSES and _met(d, number)]
        said = f"attempt {number}: {cause}, process {record.get('guilty_process')}"
        said += f", host {record.get('guilty_host')}: {record.get('message')}"
        if not any(cause in _CAUSES[d.fault.kind] for d in met):
            wrong.append(f"{said}; faults: {'; '.join(str(d.fault) for d in met) or 'none'}")
        elif len(met) == 1 and not _right_guilty(record, met[0]):
            wrong.append(f"{said}; fault: {met[0].fault}")
    if records and records[-1].get("cause") != "completed":
        wrong.append(f"the last attempt: {records[-1].get('cause')}")
    return wrong


def _right_guilty(record: Mapping[str, Any], delivery: Delivery) -> bool:
    fault = delivery.fault
    if fault.kind in _BY_PROCESS:
        return bool(record.get("guilty_process") == fault.process)
    if record.get("cause") == "host_lost":
        return bool(record.get("guilty_host") == f"local{fault.process}")
    return True


def _met(delivery: Delivery, attempt: int) -> bool:
    """Whether an attempt can have met a fault."""
    return delivery.attempts[0] <= attempt <= delivery.attempts[1]


def steps_lost(run: Path) -> int:
    """Steps that were done more than once."""
    lost = 0
    at = 0
    for number in rundir.attempt_numbers(run):
        record = rundir.attempt_record(run, number)
        first, last = record.get("first_step"), record.get("last_step")
        if first is not None and last is not None:
            lost += max(0, at - first)
            at = max(last, first)
    return lost
