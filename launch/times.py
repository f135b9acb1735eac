"""Times and durations as records hold them and as people read them."""

from __future__ import annotations

import datetime

# A unit's seconds and name, and the same of the next smaller one, which is told with it.
_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def seconds_of(text: object) -> float | None:
    """Seconds since the epoch of a record's UTC ISO 8601 time; None if it is none."""
    if not isinstance(text, str):
        return None
    try:
        parsed = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return parsed.replace(tzinfo=parsed.tzinfo or datetime.UTC).timestamp()


def duration(seconds: float) -> str:
    """`0.4 s`, `41 s`, `3 min 5 s`, `1 h 2 min`, `3 d 4 h`; below 0 counts as 0."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, name, part_size, part_name in _UNITS:
        if whole >= size:
            part = whole % size // part_size
            return f"{whole // size} {name}" + (f" {part} {part_name}" if part else "")
    return f"{whole} s"


def rough(seconds: float) -> str:
    """A duration in its largest unit alone: `41 s`, `3 min`, `2 h`, `5 d`."""
    seconds = max(0.0, seconds)
    for size, name, _, _ in _UNITS:
        if seconds >= size:
            return f"{seconds // size:.0f} {name}"
    return f"{seconds:.0f} s"


def ago(then: float | None, now: float) -> str:
    """`3 min ago`; "" for a time that is not known."""
    if then is None:
        return ""
    return f"{rough(now - then)} ago" if now - then >= 1 else "just now"
