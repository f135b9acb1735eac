"""`--config=tests/testing/configs/faulty.py:FAULT`, one of tests.testing.faults."""

from __future__ import annotations

from typing import Any

from tests.testing.configs import tiny
from tests.testing.faults import AT_STEP


def get_config(fault: str) -> Any:
    """A long training with a fault."""
    config = tiny.get_config("witness")
    config.task = "tests.testing.faulty:Faulty"
    config.data.fault = fault
    config.data.good_reads = 9 + 4 * (AT_STEP + 2)  # Nine to know the data again.
    config.num_steps = 100_000
    # A save that is still being written would meet the limit of memory first.
    config.checkpoint.every_steps = 0 if fault == "oom" else 2
    return config
