"""changes.jsonl: what was changed in the middle of a run, and after which step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch import contract
from launch.spec import resume as gate
from trainer import storage


def read_changes(workdir: str) -> list[dict[str, Any]]:
    """The records of what was changed in the middle of the run. Lead process only."""
    try:
        return gate.parse_changes(storage.read_text(os.path.join(workdir, contract.CHANGES)))
    except FileNotFoundError:
        return []


def record_change(workdir: str, history: Sequence[Mapping[str, Any]], change: Any) -> None:
    """Add a record, unless the last one says the same: a restart before the next save does all
    over again. Lead process only."""
    if history:
        last = {key: value for key, value in history[-1].items() if key not in ("time", "schema")}
        if last == json.loads(json.dumps(change, default=str)):
            return
    now = contract.utc(time.time())
    records = [*history, {"schema": contract.SCHEMA, "time": now, **change}]
    text = "".join(json.dumps(record, default=str) + "\n" for record in records)
    storage.write_text(os.path.join(workdir, contract.CHANGES), text)
