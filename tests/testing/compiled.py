"""What tests compile in their own process is kept from one run to the next, and shared by those
side by side: it is most of their time."""

import os


def keep() -> None:
    """Before jax is imported."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.expanduser("~/.cache/muster/tests")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
