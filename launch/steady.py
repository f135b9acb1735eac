"""How long an attempt took and was waited for, on record, by clocks that nobody sets."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.times import seconds_of


def now() -> dict[str, Any]:
    """Fields of the record of an attempt that starts."""
    return {"boot_id": _boot_id(), "started_monotonic": round(time.monotonic(), 3)}


def seconds_since_start(record: Mapping[str, Any]) -> float | None:
    """Since an attempt has started; None if it was on another machine, or before this one was
    started anew."""
    started = record.get("started_monotonic")
    if started is None or record.get("boot_id") != _boot_id():
        return None
    return round(max(0.0, time.monotonic() - started), 3)


def seconds_since_end(record: Mapping[str, Any]) -> float | None:
    """Likewise since an attempt has ended."""
    since_start, took = seconds_since_start(record), record.get("wall_seconds")
    if since_start is None or took is None:
        return None
    return round(max(0.0, since_start - took), 3)


def longest_life(exits: Sequence[Mapping[str, Any]]) -> float | None:
    """What an attempt took whose launcher did not live to say, by its processes' exit records:
    seconds by their agents' clocks, since the launcher's may have been set. None without any."""
    times = [(seconds_of(end.get("started_at")), seconds_of(end.get("ended_at"))) for end in exits]
    lives = [ended - started for started, ended in times if started and ended]
    return max(0.0, *lives) if lives else None


def _boot_id() -> str:
    """What the steady clock belongs to."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename
