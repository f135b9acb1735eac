"""Compiler flags per platform, in one table. Free of jax: they must be set before it is imported.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

TPU = {
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
}


def put(environment: MutableMapping[str, str], platform: str) -> None:
    """Add."""
    old = environment.get("LIBTPU_INIT_ARGS", "")
    new = [f"--{k}={v}" for k, v in TPU.items() if f"--{k}" not in old]
    environment["LIBTPU_INIT_ARGS"] = " ".join([old, *new]).strip()
