"""A witness that comes to a stand in one place."""

from __future__ import annotations

from typing import Any

from tests.testing.configs import tiny


def get_config(where: str) -> Any:
    """`--config=tests/testing/configs/stalling.py:compile` and so on."""
    config = tiny.get_config("witness")
    config.task = "tests.testing.stalling:Stalling"
    config.num_steps = 1000
    config.data.where = where
    config.data.process = -1  # all
    config.data.epochs = 2  # of the data; then it stalls, if it is to
    config.checkpoint.every_steps = 5
    if where == "eval":
        config.eval.every_steps = 7
    return config
