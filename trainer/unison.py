"""Before the first step: do all processes start with the same things, and who does not?

Processes that differ in their config, code, packages, environment or compiled program hang in some
collective, or train something that nobody asked for. One exchange over the coordination service
finds them, and all end with the same message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from launch.spec import ConfigError
from trainer import fingerprint
from trainer.agreement import broadcast, fail_together, settle
from trainer.fingerprint import Fingerprint

_REPORTED = 8  # Differences that one process reports; it only counts the rest.
_TOLD = 5  # Differences that the user is told.
_LISTED = 4  # Processes that are listed by their ids; more are counted.
_ABSENT = "not there"
# Tracing takes minutes for the largest models, and not the same time everywhere.
_PROGRAM_TIMEOUT_SECONDS = 1800.0


def check_start(config: Mapping[str, Any], task: object) -> None:
    """Compare what all processes start with. Collective: every process must call this.

    Call it when everything is imported and nothing is computed. It takes one exchange, and some
    milliseconds for reading the source files.

    Args:
      config: the resolved config as plain JSON.
      task: the user's task.

    Raises:
      ConfigError: on every process: who differs, and in what.
      TimeoutError: some processes did not come.
    """
    if jax.process_count() > 1:
        check_same("start", fingerprint.of_start(config, task))


def check_program(lowered: jax.stages.Lowered) -> None:
    """Compare the training step's program before it is compiled. Collective.

    Compiling may already be a matter of all processes: GPUs share their autotuning. So this comes
    before it, and nobody waits for a compilation only to be refused.

    Raises:
      ConfigError: on every process: whose program is another one.
      TimeoutError: some processes did not come.
    """
    if jax.process_count() > 1:
        program = fingerprint.of_program(lowered, "the training step's program")
        check_same("program", program, _PROGRAM_TIMEOUT_SECONDS)


def check_same(name: str, own: Fingerprint, timeout_seconds: float = 300.0) -> None:
    """Compare fingerprints. Collective: every process must call this.

    The lead's goes to all, and only differences come back: the lead of thousands has little to do.

    Args:
      name: of the comparison.
      own: this process's fingerprint.
      timeout_seconds: how long to wait for the others.

    Raises:
      ConfigError: on every process, accusing those that differ from most.
      TimeoutError: some processes did not come.
    """
    leads = broadcast(f"unison/{name}", own, timeout_seconds)

    def judge(reports: list[Any]) -> Any:
        finding = find(leads, [Report(**report) for report in reports])
        return dataclasses.asdict(finding) if finding else None

    report = dataclasses.asdict(compare(leads, own))
    found = settle(f"unison/{name}", report, judge, timeout_seconds)
    if found:
        finding = Finding(**found)
        fail_together(ConfigError("", finding.text), finding.differing)


@dataclasses.dataclass(frozen=True)
class Report:
    """How one process differs from the lead.

    Attributes:
      fields: the first fields that differ, with this process's text; None where it has none.
      num_more: fields that differ besides these.
    """

    fields: Mapping[str, str | None]
    num_more: int = 0


@dataclasses.dataclass(frozen=True)
class Finding:
    """That processes differ.

    Attributes:
      differing: those that are not like most of the gang, in order.
      text: who differs in what.
    """

    differing: Sequence[int]
    text: str


def compare(leads: Fingerprint, own: Fingerprint) -> Report:
    """What a process has to report, given the lead's fingerprint and its own."""
    fields = [
        field
        for field in sorted(leads.keys() | own.keys(), key=_place)
        if leads.get(field) != own.get(field)
        and (_section(field) not in fingerprint.HASHED or (field in leads and field in own))
    ]
    reported = {field: own.get(field) for field in fields[:_REPORTED]}
    return Report(reported, len(fields) - len(reported))


def find(leads: Fingerprint, reports: Sequence[Report]) -> Finding | None:
    """Who differs, and in what; None if nobody does.

    In each field most processes are right, whether the lead is one of them or not. Where no value
    has more processes than the others, the lead is right.

    Args:
      leads: the lead's fingerprint.
      reports: of all processes, in their order.
    """
    odd: dict[str, dict[str | None, list[int]]] = {}  # Field -> text -> processes with it.
    told = []
    for field in sorted({field for report in reports for field in report.fields}, key=_place):
        groups: dict[str | None, list[int]] = {}
        for process, report in enumerate(reports):
            text = report.fields.get(field, leads.get(field))
            groups.setdefault(text, []).append(process)
        right = max(groups, key=lambda text: (len(groups[text]), text == leads.get(field)))
        right_processes = groups.pop(right)
        odd[field] = groups
        told.append(_told(field, groups, right, right_processes))
    if not told:
        return None
    num_more = len(told) - _TOLD if len(told) > _TOLD else 0
    num_more += max(report.num_more for report in reports)
    more = f"; and {num_more} more" if num_more else ""
    processes = {i for groups in odd.values() for group in groups.values() for i in group}
    return Finding(sorted(processes), "; ".join(told[:_TOLD]) + more + _advice(odd))


def _told(
    field: str,
    odd: Mapping[str | None, Sequence[int]],
    right: str | None,
    right_processes: Sequence[int],
) -> str:
    """`flax is 0.12.1 on process 3, 0.12.2 on the others`."""
    name = field.partition("/")[2]
    if _section(field) in fingerprint.HASHED:
        processes = sorted(i for group in odd.values() for i in group)
        return f"{name} differs on {_listed(processes)}"
    parts = [f"{_ABSENT if text is None else text} on {_listed(odd[text])}" for text in odd]
    others = "the others" if len(right_processes) > 1 else _listed(right_processes)
    return f"{name} is {', '.join(parts)}, {_ABSENT if right is None else right} on {others}"


def _advice(fields: Iterable[str]) -> str:
    if any(_section(field) == fingerprint.PROGRAM for field in fields):
        return (
            "; the task's Python code depends there on the process (its id, clock, random numbers "
            "or files): make it the same on all"
        )
    return "; start every process with the same config, packages, environment and code"


def _section(field: str) -> str:
    return field.partition("/")[0]


def _place(field: str) -> tuple[int, str]:
    """The order in which fields are told."""
    return fingerprint.SECTIONS.index(_section(field)), field


def _listed(processes: Sequence[int]) -> str:
    """`process 3`, `processes 1 and 3`, `processes 1, 2, 3 and 16 others`."""
    if len(processes) == 1:
        return f"process {processes[0]}"
    if len(processes) <= _LISTED:
        return f"processes {', '.join(map(str, processes[:-1]))} and {processes[-1]}"
    shown = processes[: _LISTED - 1]
    return f"processes {', '.join(map(str, shown))} and {len(processes) - len(shown)} others"
