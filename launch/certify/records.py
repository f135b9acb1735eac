"""What a certified run has written down of itself, read back. Pure but for the reading."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

INITIAL, RESTORED, AFTER = "initial", "restored", "after"

# Of a leaf: (process, place of the part) -> digest.
Parts = dict[tuple[int, str], str]


@dataclasses.dataclass
class Step:
    """One update, as the processes of one attempt saw it.

    Attributes:
      rows: row of the global batch -> digest of its arrays; several if processes disagree.
      metrics: name -> value by process.
      learning_rate: by process; None where it is not known.
      position: of the data behind the batch, by process.
    """

    rows: dict[int, set[str]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    learning_rate: dict[int, float | None] = dataclasses.field(default_factory=dict)
    position: dict[int, Any] = dataclasses.field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The loss, by the first process that has one."""
        return next(iter(self.metrics.get("loss", {}).values()), None)


@dataclasses.dataclass
class Execution:
    """One attempt.

    Attributes:
      number: of the attempt.
      start: the step that it went on from; None if it never came so far.
      steps: by number.
      states: (step, INITIAL, RESTORED or AFTER) -> leaf -> digests.
      facts: of the lead process: kinds of the leaves, versions, mesh, devices.
    """

    number: int
    start: int | None = None
    steps: dict[int, Step] = dataclasses.field(default_factory=dict)
    states: dict[tuple[int, str], dict[str, Parts]] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Records:
    """All attempts of a run, in order."""

    attempts: list[Execution]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the first attempt that has any."""
        return next((attempt.facts for attempt in self.attempts if attempt.facts), {})

    @property
    def losses(self) -> dict[int, float]:
        """Step -> loss, of the attempt that did it last."""
        return {
            step: record.loss
            for attempt in self.attempts
            for step, record in sorted(attempt.steps.items())
            if record.loss is not None
        }

    def step(self, number: int) -> Step | None:
        """A step, of the first attempt that did it."""
        return next((a.steps[number] for a in self.attempts if number in a.steps), None)

    def state(self, step: int) -> dict[str, Parts] | None:
        """The state after a step, of the first attempt that was there."""
        for attempt in self.attempts:
            for when in (AFTER, INITIAL):
                if (step, when) in attempt.states:
                    return attempt.states[step, when]
        return None


def read(directory: Path) -> Records:
    """All records below a plan's directory; what was cut off by a kill is left out."""
    attempts = []
    for folder in sorted(directory.glob("attempt-*")):
        execution = Execution(int(folder.name.rpartition("-")[2]))
        for path in sorted(folder.glob("process-*.jsonl")):
            process = int(path.stem.rpartition("-")[2])
            _add(execution, process, _lines(path.read_bytes()))
        attempts.append(execution)
    return Records(attempts)


def _lines(data: bytes) -> Iterable[dict[str, Any]]:
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # The line at which the process was killed.
        if isinstance(record, dict):
            yield record


def _add(execution: Execution, process: int, lines: Iterable[Mapping[str, Any]]) -> None:
    for record in lines:
        event, number = record["event"], record["step"]
        if event == "start":
            execution.start = number
            execution.facts.update({k: v for k, v in record.items() if k not in ("event", "step")})
        elif event == "state":
            leaves = execution.states.setdefault((number, record["when"]), {})
            for name, parts in record["leaves"].items():
                leaf = leaves.setdefault(name, {})
                leaf.update({(process, place): digest for place, digest in parts.items()})
        elif event == "step":
            step = execution.steps.setdefault(number, Step())
            for row, digest in record["rows"]:
                step.rows.setdefault(row, set()).add(digest)
            for name, value in record["metrics"].items():
                step.metrics.setdefault(name, {})[process] = value
            step.learning_rate[process] = record["learning_rate"]
            step.position[process] = record["position"]


def marks(directory: Path) -> list[dict[str, Any]]:
    """The marks that faults left, in order."""
    found = []
    for path in sorted(directory.glob("fault-*.json")):
        try:
            found.append(json.loads(path.read_bytes()))
        except (OSError, ValueError):
            continue
    return found
