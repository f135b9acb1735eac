"""How it is trained."""

from __future__ import annotations

from ml_collections import ConfigDict

from tests.testing.configs import tiny

BATCH_SIZE = 16
SAVE_EVERY_STEPS = 10


def get_config(num_steps: str) -> ConfigDict:
    """A long row of short steps; `--config=FILE:120` has 120."""
    config = tiny.get_config("witness")
    config.task = "tests.testing.chaos.task:Chaotic"
    config.num_steps = int(num_steps)
    config.checkpoint.every_steps = SAVE_EVERY_STEPS
    config.global_batch_size = BATCH_SIZE
    return config
