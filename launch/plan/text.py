"""Plans in words. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def one_line(record: Mapping[str, Any]) -> str:
    """Whether it fits, and how long a step takes at the least."""
    peak, usable = record.get("peak_bytes"), usable_bytes(record)
    memory = size(peak) if usable is None else f"{size(peak)} of {size(usable)}"
    if record["fits"] is False:
        return f"it takes {memory} per device"
    text = f"the training step {'fits' if record['fits'] else 'compiles'}: {memory} per device"
    seconds, mfu = record.get("step_seconds_bound"), record.get("mfu_bound")
    if seconds:
        text += f", {short_seconds(seconds)} a step at the least"
        text += f" (MFU {mfu:.0%} at the most)" if mfu else ""
    return text


def usable_bytes(record: Mapping[str, Any]) -> int | None:
    """Memory of a device that a program can have; None where it is not known."""
    return record.get("usable_hbm_bytes") or record.get("hbm_bytes")


def size(count: float | None) -> str:
    """1536 -> '1.5 KiB'; '?' for what is not known."""
    if count is None:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def short_seconds(seconds: float | None) -> str:
    """0.01234 -> '12.3 ms'; '?' for what is not known."""
    if seconds is None:
        return "?"
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
