"""`muster run` of a run that is running already: look on until it ends."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.console import Console
from launch.events import Retry, Verdict
from launch.logs import next_attempt
from launch.ownership import InUseError
from launch.spec import ConfigError, compare_configs
from launch.words import last_words

_POLL_SECONDS = 0.1
# Of run.json: what two commands must agree in to be the same run.
_SAME = ("program", "cwd")


def check_same(workdir: Path, wanted: Mapping[str, Any], in_use: InUseError) -> None:
    """Refuse to look on at something else than what was asked for.

    Args:
      workdir: the run directory.
      wanted: what this command's run.json would say.
      in_use: who has the directory.

    Raises:
      ConfigError: says who has it, and what differs.
    """
    running = rundir.read_record(workdir / contract.RUN_RECORD) or {}
    differences = [
        f"{name}: {running.get(name)!r} there, {wanted[name]!r} now"
        for name in _SAME
        if running.get(name) != wanted[name]
    ]
    clusters = compare_configs(running.get("cluster") or {}, wanted["cluster"], "cluster")
    differences += [str(difference) for difference in clusters]
    if differences:
        rule = f"{in_use.rule}. It is not what this command would start: {'; '.join(differences)}"
        raise ConfigError(in_use.field, rule, in_use.value)


def view(workdir: Path, shown: Sequence[int], prefixed: bool) -> int:
    """Show a run that another launcher runs, attempt after attempt; returns its exit code.

    Ctrl-C ends the looking on, not the run.
    """
    owner = rundir.owner(workdir) or {}
    _say(
        f"muster: run {owner.get('id')} is running already (host {owner.get('host')}, process id "
        f"{owner.get('pid')}): looking on; Ctrl-C leaves it running, `muster stop {workdir}` "
        "stops it"
    )
    console = Console(shown, prefixed)
    number = max(rundir.attempt_numbers(workdir), default=0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            record = _watch_attempt(workdir, number, console)
            if record.get("cause"):
                tell_end(record, rundir.attempt_path(workdir, number))
            if not next_attempt(workdir, number):
                break
            number += 1
    except KeyboardInterrupt:
        _say(f"muster: the run goes on; `muster stop {workdir}` stops it")
        return contract.EXIT_RESUMABLE
    return int(record.get("exit_code", contract.EXIT_FAILED))


def _watch_attempt(workdir: Path, number: int, console: Console) -> dict[str, Any]:
    """Show an attempt to its end; its record."""
    path = rundir.attempt_path(workdir, number)
    following = False
    while True:
        # Asked for first: nobody writes after the last one has left.
        alone = rundir.owner(workdir) is None
        record = rundir.read_record(path / rundir.ATTEMPT_RECORD) or {}
        if record and not following:
            following = True
            console.follow(path, record.get("num_processes", 0))
        console.show_new(last=bool(record.get("cause")) or alone)
        if record.get("cause") or alone:
            return record
        time.sleep(_POLL_SECONDS)


def tell_end(record: Mapping[str, Any], attempt: Path) -> None:
    """Say how an attempt ended, from its record."""
    verdict = Verdict(
        record["cause"],
        record.get("exit_code", contract.EXIT_FAILED),
        record.get("message", ""),
        record.get("guilty_process"),
        record.get("guilty_host"),
        record.get("explanation", ""),
        last_lines=tuple(record.get("last_lines") or ()),
    )
    for text in last_words(verdict, Retry(**(record.get("retry") or {"again": False})), attempt):
        _say(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
