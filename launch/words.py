"""The last words on an attempt: what became of it and who is to blame, for a tired person."""

from __future__ import annotations

import textwrap
from pathlib import Path

from launch import rundir
from launch.console import last_lines
from launch.events import Retry, Verdict

_COLUMNS = 100
_QUOTED_LINES = 20
_SEARCHED_LINES = 200  # For what a program says of its config, which other output may follow.


def last_words(verdict: Verdict, retry: Retry, attempt: Path) -> list[str]:
    """What the user is told at the end of an attempt.

    Args:
      verdict: why it ended.
      retry: what follows.
      attempt: its directory.
    """
    told = [_what_happened(verdict, attempt)]
    if retry.why:
        told.append(f"muster: {retry.why}")
    return told


def _what_happened(verdict: Verdict, attempt: Path) -> str:
    if verdict.guilty_process is None and verdict.guilty_host is None:
        return f"muster: {verdict.cause}" + (f": {verdict.message}" if verdict.message else "")
    log = guilty_log(attempt, verdict)
    if verdict.cause == "config":
        # The program's own word on what is wrong says it all.
        errors = [line for line in last_lines(log, _SEARCHED_LINES) if _is_error(line)]
        if errors:
            return "muster: " + errors[-1]
    told = [f"muster: error: {verdict.message}"]
    told += textwrap.wrap(
        _beyond_the_message(verdict),
        _COLUMNS,
        initial_indent="muster: ",
        subsequent_indent="muster: ",
    )
    lines = list(verdict.last_lines[-_QUOTED_LINES:]) or last_lines(log, _QUOTED_LINES)
    if lines:
        whose = (
            "the agent's log"
            if verdict.guilty_process is None
            else f"process {verdict.guilty_process}"
        )
        told += [f"muster: last lines of {whose}:", *(f"    {line}" for line in lines)]
        told += [f"muster: full log: {log}"]
    return "\n".join(told)


def _beyond_the_message(verdict: Verdict) -> str:
    """What the explanation says more than the message, with which it may begin."""
    begins = verdict.explanation.lower().startswith(verdict.message.lower())
    return (
        verdict.explanation[len(verdict.message) :].lstrip(". ")
        if begins
        else (verdict.explanation)
    )


def _is_error(line: str) -> bool:
    return line.lower().startswith("error:")


def guilty_log(attempt: Path, verdict: Verdict) -> Path:
    """The log that explains a verdict: the guilty process's, or the agent's of the guilty host."""
    if verdict.guilty_process is not None:
        return rundir.log_path(attempt, verdict.guilty_process)
    return rundir.agent_log_path(attempt, str(verdict.guilty_host))
