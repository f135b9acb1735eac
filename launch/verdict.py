"""Why an attempt ended: one judgment from all that was seen of it, in words for a tired person."""

from __future__ import annotations

import dataclasses

from launch import contract, hang
from launch.case import Case, Suspect, listed
from launch.events import Exited, NotStarted, Verdict
from launch.evidence import (
    Fault,
    describe_end,
    describe_failure,
    fatal_signal,
    out_of_memory,
    type_name,
)

_MEMORY_ADVICE = {
    "device": "A smaller batch, more microbatches or more sharding need less of it.",
    "host": "Fewer or smaller processes on a host, or fewer data workers and smaller buffers, need "
    "less of it.",
}


def judge(case: Case) -> Verdict:
    """Judge an attempt of which nothing is alive any more.

    Whoever failed first of itself, process or host, is guilty, whatever order the reports came in.
    Next comes a process that hangs, then one that others accuse. What speaks of a peer's death
    counts only when there is nothing else.
    """
    if case.stopped_by_user:
        return _of_stop(case, "stopped", "stopped")
    if case.interrupted is not None:
        found = _of_stop(case, case.interrupted.cause, case.interrupted.message)
        return dataclasses.replace(found, guilty_host=found.guilty_host or case.interrupted.host)
    verdict = _guilty(case)
    if verdict is not None:
        return _with_collateral(case, verdict)
    exits = [end for end in case.ends.values() if isinstance(end, Exited)]
    if any(end.exit_code == contract.EXIT_RESUMABLE for end in exits):
        message = "the program stopped early and can be resumed: start the same command again"
        return Verdict("preempted", contract.EXIT_RESUMABLE, message, explanation=message)
    if case.running:
        process_id = min(case.running)
        message = f"the end of {case.who(process_id)} was never heard of"
        host = case.host_of(process_id)
        return Verdict(
            "host_lost",
            contract.EXIT_FAILED,
            message,
            guilty_host=host,
            explanation=f"{_sentence(message)} Its host's agent ended without a word about it.",
        )
    return _of_own_accord(case) or Verdict("completed", contract.EXIT_DONE)


def _guilty(case: Case) -> Verdict | None:
    """The verdict on whoever ended the gang; None if nobody did."""
    faults = sorted(case.faults.values(), key=lambda fault: (fault.at, fault.process_id))
    own = next((fault for fault in faults if fault.own), None)
    lost = min(((at, host) for host, at in case.lost.items()), default=None)
    hung_at = case.overdue.at if case.overdue else None
    firsts = [fault.at for fault in (own,) if fault] + [lost[0] for lost in (lost,) if lost]
    if (
        case.overdue
        and case.suspect
        and hung_at is not None
        and hung_at < min(firsts, default=1e99)
    ):
        return _of_suspect(case, case.suspect, case.overdue.cause)
    accuser = next((f for f in faults if f.accuses and not f.collateral), None)
    if accuser is not None:
        verdict = _of_accusation(case, accuser, own, lost)
        if verdict is not None:
            return verdict
    if lost is not None and (own is None or lost[0] < own.at):
        return _of_lost_host(case, lost[1])
    if own is not None:
        return _blame(case, own)
    if case.leaves_until is not None:
        return _of_laggard(case)
    peers = [fault for fault in faults if fault.of_a_peer and not fault.told]
    if peers:
        found = case.suspect or hang.deserter(case)
        if found is not None:
            return _of_suspect(case, found, "hang")
        return _of_own_accord(case, before=peers[0].at) or _blame(case, peers[0])
    return None


def _of_stop(case: Case, cause: str, reason: str) -> Verdict:
    """After a stop that somebody wanted, any end is expected, except a failure of the program's
    own."""
    faults = sorted(case.faults.values(), key=lambda fault: (fault.at, fault.process_id))
    for fault in faults:
        by_signal = fault.end is not None and fatal_signal(fault.end) is not None
        excused = fault.of_a_peer or fault.accuses or (by_signal and fault.failure is None)
        if case.killed_at is None and not excused:
            blamed = _blame(case, fault)
            message = f"while stopping, {blamed.message}"
            why = "The run was asked to stop" if cause == "stopped" else _sentence(reason)[:-1]
            explanation = f"{why}; while stopping, {blamed.explanation}"
            return dataclasses.replace(
                blamed, cause=cause, message=message, explanation=explanation
            )
    message = reason
    if cause == "stopped":
        message += "; start the same command again to go on"
    return Verdict(cause, contract.EXIT_RESUMABLE, message, explanation=message)


def _of_lost_host(case: Case, host: str) -> Verdict:
    message = f"host {host} was lost: its agent is gone or not heard of"
    others = sorted(set(case.lost) - {host})
    more = f" So were {len(others)} other hosts." if others else ""
    first = case.first_process(host)
    ids = range(first, first + case.processes_per_host)
    steps = [case.progress[i].step for i in ids if i in case.progress]
    step = f" It was last heard of at step {max(steps)}." if steps else ""
    return Verdict(
        "host_lost",
        contract.EXIT_FAILED,
        message,
        guilty_host=host,
        explanation=f"{_sentence(message)}{step}{more} The machine, its network or the agent may "
        "have died; the others cannot go on without it.",
    )


def _of_own_accord(case: Case, before: float = float("inf")) -> Verdict | None:
    """The verdict where an agent told its processes to stop, and not because of us; None if none
    did."""
    cut_off = [
        (end.told_at, end.process_id)
        for end in case.ends.values()
        if isinstance(end, Exited) and end.exit_code != 0
        if end.told_at is not None and end.told_at < before
    ]
    if not cut_off:
        return None
    host = case.host_of(min(cut_off)[1])
    message = f"the agent of host {host} stopped its processes by itself"
    return Verdict(
        "host_lost",
        contract.EXIT_FAILED,
        message,
        guilty_host=host,
        explanation=f"{_sentence(message)} It was sent a signal, or heard nothing of this launcher "
        "for the time of its lease: the machine is wanted back, or one of the two was suspended.",
    )


def _of_suspect(case: Case, found: Suspect, cause: str) -> Verdict:
    cause = "exception" if found.left else cause
    explanation = _sentence(found.message)
    if found.reason:
        explanation += " " + _sentence(found.reason)
    end = case.ends.get(found.process_id) if found.process_id is not None else None
    return Verdict(
        cause,
        contract.EXIT_FAILED,
        found.message,
        found.process_id,
        None if found.process_id is None else case.host_of(found.process_id),
        explanation,
        last_lines=end.last_lines if isinstance(end, Exited) else (),
    )


def _of_accusation(
    case: Case, accuser: Fault, own: Fault | None, lost: tuple[float, str] | None
) -> Verdict | None:
    """The verdict on the process that another one names; None if something else came first."""
    accused = [process for process in accuser.accuses if case.knows(process)]
    faults = [case.faults[process] for process in accused if process in case.faults]
    guilty = [fault for fault in faults if fault.own]
    if guilty:
        return _blame(case, min(guilty, key=lambda fault: (fault.at, fault.process_id)))
    gone = {case.host_of(process) for process in accused}.intersection(case.lost)
    if gone:
        return _of_lost_host(case, min(gone, key=lambda host: (case.lost[host], host)))
    before = min([f.at for f in (own,) if f] + [lost[0] for lost in (lost,) if lost], default=None)
    if not accused or (before is not None and before < accuser.at):
        return None
    failure = accuser.failure
    assert failure is not None
    if type_name(failure) == "ConfigError" or accuser.exit_code == contract.EXIT_CONFIG:
        cause, code, how = "config", contract.EXIT_CONFIG, "differs from the others"
    elif type_name(failure) in ("TimeoutError", "AbsentError"):  # The latter is the trainer's.
        cause, code, how = "start_timeout", contract.EXIT_FAILED, "did not come"
    else:
        cause, code, how = "exception", contract.EXIT_FAILED, "is to blame"
    process_id = accused[0]
    said = describe_failure(failure).partition(": ")[2] or failure.type
    message = f"{case.who(process_id)} {how}: {said}"
    by = "its own" if accuser.process_id == process_id else f"process {accuser.process_id}'s"
    explanation = f"{_sentence(message)} This is {by} word."
    if len(accused) > 1:
        explanation += f" It names {listed(accused)}."
    doing = hang.doing(case, process_id)
    if doing:
        explanation += f" When asked, {doing}."
    end = case.ends.get(process_id)
    lines = end.last_lines if isinstance(end, Exited) else ()
    return Verdict(
        cause, code, message, process_id, case.host_of(process_id), explanation, failure, lines
    )


def _of_laggard(case: Case) -> Verdict | None:
    """The verdict on a process that had to be killed when the others had saved and left."""
    late = [f for f in case.faults.values() if f.told and fatal_signal(f.end) is not None]
    if case.killed_at is None or not late:
        return None
    fault = min(late, key=lambda fault: fault.process_id)
    message = (
        f"{case.who(fault.process_id)} did not end in time after others had left with exit code "
        f"{contract.EXIT_RESUMABLE}, and was killed{case.at_step(fault.process_id)}"
    )
    return Verdict(
        "killed",
        contract.EXIT_FAILED,
        message,
        fault.process_id,
        case.host_of(fault.process_id),
        _sentence(message) + " A longer grace_seconds gives it more time.",
        last_lines=fault.last_lines,
    )


def _blame(case: Case, fault: Fault) -> Verdict:
    """The verdict on a process that failed."""
    end, failure = fault.end, fault.failure
    memory = out_of_memory(fault)
    code = contract.EXIT_FAILED
    if isinstance(end, NotStarted) or fault.exit_code == contract.EXIT_CONFIG:
        cause, code = "config", contract.EXIT_CONFIG
    elif memory is not None:
        cause = "oom"
    elif failure is None and fatal_signal(end) is not None:
        cause = "killed"
    else:
        cause = "exception"
    who, where = case.who(fault.process_id), case.at_step(fault.process_id)
    advice = ""
    if memory is not None:
        message = f"{who} ran out of memory on the {memory}{where}"
        told = describe_failure(failure) if failure else ""
        if not told and isinstance(end, Exited):
            told = describe_end(end)
        message += f": {told}" if told else ""
        advice = " " + _MEMORY_ADVICE[memory]
    elif failure is not None:
        message = f"{who} failed{where}: {describe_failure(failure)}"
    else:
        assert end is not None
        message = f"{who} {describe_end(end)}{where}"
    how = ""
    if failure is not None and isinstance(end, Exited) and end.told_at is not None:
        how = " It did not end by itself after that, and was stopped."
    elif failure is not None and isinstance(end, Exited) and fatal_signal(end) is not None:
        how = f" After that it {describe_end(end)}."
    alone = ""
    if fault.of_a_peer:
        alone = " It speaks of another process, but none is known to have failed before it."
    return Verdict(
        cause,
        code,
        message,
        fault.process_id,
        case.host_of(fault.process_id),
        f"{_sentence(message)}{how}{alone}{advice}",
        failure,
        fault.last_lines,
    )


def _with_collateral(case: Case, verdict: Verdict) -> Verdict:
    """Add who failed only because of the guilty one."""
    others = [
        fault.process_id
        for fault in case.faults.values()
        if fault.process_id != verdict.guilty_process and not fault.own
    ]
    also = sorted(
        fault.process_id
        for fault in case.faults.values()
        if fault.process_id != verdict.guilty_process and fault.own
    )
    explanation = verdict.explanation
    if others:
        number = "One other process" if len(others) == 1 else f"{len(others)} other processes"
        explanation += f" {number} ended because of it."
    if also:
        explanation += f" {_sentence(listed(also))[:-1]} failed too, but not first."
    return dataclasses.replace(verdict, explanation=explanation, collateral=tuple(sorted(others)))


def _sentence(text: str) -> str:
    """A message as a sentence."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
