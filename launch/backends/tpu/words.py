"""A run's machines in words, for `muster status`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.times import ago, rough, seconds_of


def rows(machines: Mapping[str, Any], now: float) -> dict[str, str]:
    """Lines of the header: what there is, and what it has cost.

    Args:
      machines: as `ledger.report` gives it.
      now: seconds since the epoch.
    """
    there = [_one(asked, now) for asked in machines["open"]]
    lines = {"machines": "; ".join(there) + " (kept)" * machines["kept"]} if there else {}
    if machines["chip_hours"]:
        text = f"{machines['chip_hours']:.2f} chip hours"
        if machines["cost"] is not None:
            text += f" × {machines['price_per_chip_hour']:g} = {machines['cost']:.2f}"
        lines["cost"] = text
    return lines


def _one(asked: Mapping[str, Any], now: float) -> str:
    kind = "queued resource" if asked["kind"] == "queued-resources" else "TPU VM"
    state = asked["state"] or "about to be asked for"
    text = f"{kind} {asked['name']} in {asked['zone']}: {state}"
    since = seconds_of(asked["state_since"])
    if since is not None:
        text += f" for {rough(now - since)}"
    return f"{text}, asked for {ago(seconds_of(asked['asked_at']), now)}"
