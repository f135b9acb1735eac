"""`--config=tests/testing/configs/broken.py:iterator`: see tests.testing.broken_tasks."""

from __future__ import annotations

from ml_collections import ConfigDict

FAULTS = {
    "sound": "Sound",
    "rng": "UnsavedRng",
    "iterator": "UnsavedIterator",
    "set": "SetOrder",
    "time": "TimeSeeded",
    "moments": "Sound",
}


def get_config(fault: str = "sound") -> ConfigDict:
    """A short training with one of FAULTS, or `sound`."""
    optimizer = ConfigDict({"chain": ("adam",), "adam": {"learning_rate": 1e-2}})
    if fault == "moments":
        import optax

        from tests.testing.broken_tasks import forgetful_momentum

        optax.forgetful_momentum = forgetful_momentum  # As somebody's own config file would.
        optimizer = ConfigDict({"chain": ("forgetful_momentum",), "forgetful_momentum": {}})
    return ConfigDict(
        {
            "task": f"tests.testing.broken_tasks:{FAULTS[fault]}",
            "seed": 3,
            "num_steps": 100,
            "global_batch_size": 16,
            "optimizer": optimizer,
            "eval": {"every_steps": 50 if fault == "sound" else 0, "num_batches": 2},
        }
    )
