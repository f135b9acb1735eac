"""Trainings in which one process is not like the others.

`--config=tests/testing/configs/odd.py:start`: process 1 has another config, another version of a
package and another source file, which lies in the directory STALE_CODE; `:program`: process 0 has
another training step.
"""

from __future__ import annotations

import os
from typing import Any

from launch import contract
from tests.testing.configs import tiny

STALE_CODE = "STALE_CODE"  # An environment variable.
ODD = {"start": 1, "program": 0}


def is_odd(what: str, odd: str) -> bool:
    """Is it this process that differs, and in this?"""
    return what == odd and os.environ.get(contract.PROCESS_ID) == str(ODD[odd])


def get_config(odd: str) -> Any:
    """`start` or `program`: what one process has otherwise."""
    config = tiny.get_config("witness")
    config.task = "tests.testing.odd:Odd"
    config.data.odd = odd
    config.global_batch_size = 12
    if is_odd("start", odd):
        config.optimizer.adamw.learning_rate = 0.001
        import trainer

        trainer.__path__.insert(0, os.environ[STALE_CODE])
    return config
