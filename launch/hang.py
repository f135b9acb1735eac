"""Names the process that the others of a gang wait for, or gave up on, and says why."""

from __future__ import annotations

from launch import contract, stacks
from launch.case import Case, Suspect, listed
from launch.events import Exited, Progress
from launch.evidence import first_to_leave, silent_peers
from launch.watch import is_leaving

_STATES = {
    "T": "is stopped: something sent it SIGSTOP or a debugger holds it",
    "t": "is stopped by a debugger",
    "D": "is stuck in the kernel, waiting for a disk or a network file system",
}


def suspect(case: Case) -> Suspect:
    """Whom an overdue gang waits for, by what tells it most surely: who left, who is stopped, who
    is behind, whose stack differs."""
    overdue = case.overdue
    assert overdue is not None
    if overdue.cause == "start_timeout":
        return _never_came(case)
    left = _left_early(case)
    if left is not None:
        return _leaver(case, left)
    compared = stacks.compare(case.stacks)
    halted = _halted(case)
    if halted is not None:
        return _hanging(case, halted, compared)
    living = case.running.intersection(case.progress)
    behind = [process for process in overdue.processes if process in living]
    if behind and len(behind) * 2 <= len(living) and len(behind) < len(living):
        odd = [process for process in behind if process in compared.odd]
        if len(odd or behind) > 1:
            reason = f"{listed(behind)} are behind the others"
        else:
            reason = "it is behind the others"
        return _hanging(case, _oldest(case, odd or behind), compared, reason)
    if compared.odd:
        reason = f"{listed(compared.odd)} stand elsewhere than the rest" * (len(compared.odd) > 1)
        return _hanging(case, _oldest(case, list(compared.odd)), compared, reason)
    waits = f"; all of them wait {compared.where_waiting}" if compared.where_waiting else ""
    return Suspect(
        None,
        f"the gang hangs: no progress for {overdue.at - overdue.since:.0f} s at step "
        f"{overdue.step} ({overdue.phase}), and no process stands out{waits}",
        reason=_each(case),
    )


def deserter(case: Case) -> Suspect | None:
    """Whom the others gave up on, when all that failed speak of a peer: one that left before they
    were done, or is alive and does not answer. None if there is no such process."""
    left = _left_early(case)
    if left is None:
        for fault in case.faults.values():
            first = first_to_leave(fault) if fault.of_a_peer else None
            if first is not None and _may_have_left(case, first):
                left = first
                break
    if left is not None:
        return _leaver(case, left)
    # Asked for its stack, and neither failed before nor since but by our own signal.
    alive = {i for i in case.stacks if i not in case.faults or case.faults[i].told}
    compared = stacks.compare(case.stacks)
    halted = _halted(case, alive)
    if halted is not None:
        return _hanging(case, halted, compared)
    for fault in case.faults.values():
        if fault.of_a_peer and not fault.told:
            silent = [process for process in silent_peers(fault) if process in alive]
            if silent:
                reason = "the others no longer heard its heartbeat"
                return _hanging(case, silent[0], compared, reason)
    odd = [process for process in compared.odd if process in alive]
    if not odd and len(alive) == 1 and case.num_processes > 1:
        odd = list(alive)
    return _hanging(case, _oldest(case, odd), compared) if odd else None


def _left_early(case: Case) -> int | None:
    """The first process that left by itself while the others had more to do."""
    left = []
    for process_id, end in case.ends.items():
        if isinstance(end, Exited) and end.exit_code == contract.EXIT_DONE and end.told_at is None:
            left.append((end.ended_at, process_id))
    for process_id, report in case.progress.items():
        if is_leaving(report) and process_id not in case.ends and _may_have_left(case, process_id):
            left.append((report.since, process_id))
    gone = {process_id for _, process_id in left}
    if len(gone) == case.num_processes:
        return None
    staying = [report for i, report in case.progress.items() if i not in gone]
    return next((i for _, i in sorted(left) if not _was_done(case, i, staying)), None)


def _was_done(case: Case, process_id: int, staying: list[Progress]) -> bool:
    """Whether others had no further step to do than a process that left."""
    report = case.progress.get(process_id)
    if report is None:
        return False
    at = report.step
    return any(o.step < at or (o.step == at and o.phase in ("save", "eval")) for o in staying)


def _may_have_left(case: Case, process_id: int) -> bool:
    """Whether a process took its leave by itself: not for an exception, nor at our word."""
    fault = case.faults.get(process_id)
    report = case.progress.get(process_id)
    told = case.stopped_at is not None and report is not None and report.since >= case.stopped_at
    return case.knows(process_id) and not told and (fault is None or fault.failure is None)


def _leaver(case: Case, process_id: int) -> Suspect:
    """Says that a process was done before the others."""
    end = case.ends.get(process_id)
    report = case.progress.get(process_id)
    step = f" at step {report.step}" if report is not None else ""
    gone = isinstance(end, Exited) and end.exit_code == contract.EXIT_DONE
    did = "ended with exit code 0" if gone else "left"
    message = f"{case.who(process_id)} {did}{step} while the others were still training"
    reason = (
        "every process of a gang must take the same number of steps: see whether this one's data "
        "ended sooner, or whether it returned early"
    )
    return Suspect(process_id, message, reason, left=True)


def _never_came(case: Case) -> Suspect:
    overdue = case.overdue
    assert overdue is not None
    halted = _halted(case, set(overdue.processes))
    guilty = overdue.processes[0] if halted is None else halted
    many = len(overdue.processes)
    others = f" ({listed(overdue.processes)} have not)" if many > 1 else ""
    return Suspect(
        guilty,
        f"{case.who(guilty)} never reported within {overdue.limit_seconds:g} s of its start and "
        f"of the first report of another{others}",
        reason=doing(case, guilty),
    )


def _halted(case: Case, among: set[int] | None = None) -> int | None:
    """A process that the kernel does not let run, if not all are so."""
    for states in ("Tt", "D"):
        found = [i for i, taken in case.stacks.items() if taken.state and taken.state in states]
        found = [i for i in found if among is None or i in among]
        if found and len(found) < case.num_processes:
            return _oldest(case, found)
    return None


def _oldest(case: Case, processes: list[int]) -> int:
    """The one that has moved the least, and for the longest time."""

    def key(process_id: int) -> tuple[int, float, int]:
        report = case.progress.get(process_id)
        return (-1, 0.0, process_id) if report is None else (report.step, report.since, process_id)

    return min(processes, key=key)


def _hanging(case: Case, process_id: int, compared: stacks.Comparison, reason: str = "") -> Suspect:
    report = case.progress.get(process_id)
    since = ""
    now = case.overdue.at if case.overdue else case.stopped_at
    if report is not None and now is not None:
        age = f"no progress for {max(0.0, now - report.since):.0f} s"
        since = f": {age} at step {report.step} ({report.phase})"
    message = f"{case.who(process_id)} hangs{since}"
    told = [part for part in (message, doing(case, process_id)) if part]
    others = [other for other in compared.waiting if other != process_id]
    if others:
        number = "the other waits" if len(others) == 1 else f"the {len(others)} others wait"
        told[-1] += f"{', ' if len(told) > 1 else '; '}{number} {compared.where_waiting}"
    return Suspect(process_id, "; ".join(told), reason=reason)


def doing(case: Case, process_id: int) -> str:
    """What a process does, by its state and its stack."""
    taken = case.stacks.get(process_id)
    if taken is None:
        return ""
    said = []
    if taken.state in _STATES:
        said.append(f"it {_STATES[taken.state]}")
    frames = stacks.main_thread(taken.text)
    if frames:
        said.append(f"its main thread is in {stacks.where(frames)}")
    elif not said:
        busy = "is busy" if taken.state == "R" else "did not answer"
        said.append(f"it {busy} and showed no Python stack")
    return ", ".join(said)


def _each(case: Case) -> str:
    """Where processes are, by the place of most; for a report without a guilty one."""
    places: dict[str, list[int]] = {}
    for process_id, taken in sorted(case.stacks.items()):
        frames = stacks.main_thread(taken.text)
        if frames:
            places.setdefault(stacks.where(frames), []).append(process_id)
    most = sorted(places.items(), key=lambda item: -len(item[1]))[:3]
    if len(places) < 2:
        return ""
    return "; ".join(f"{listed(processes)} in {place}" for place, processes in most)
