"""A few large matrices, which no step is needed for: they are planned."""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """20 GiB of params, which only fit a v5e chip when they are split."""
    return ConfigDict(
        {
            "task": "tests.testing.wide:Wide",
            "num_steps": 3,
            "global_batch_size": 8,
            "model": {"width": 1 << 14, "depth": 20},
            "optimizer": {"chain": ("sgd",), "sgd": {"learning_rate": 0.1}},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "dcn_data": 1, "dcn_fsdp": 1},
        }
    )
