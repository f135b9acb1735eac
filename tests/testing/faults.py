"""What can befall one process of a gang, on purpose: named faults, and programs that have them.

`muster run ... -- python -m tests.testing.faults FAULT` is a gang that computes a sum over all
processes at every step; the task `tests.testing.faulty:Faulty` is a training. Process 2 is the one
that it befalls.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from launch import contract

GUILTY = 2
AT_STEP = 5
# In the loop, after some steps.
IN_LOOP = ("raise", "kill", "stop", "sleep", "spin", "leave", "oom")
# Before the gang has come together.
AT_START = ("import", "absent")


def befall(fault: str) -> None:
    """Let it happen to this process, here and now."""
    if fault in ("raise", "import"):
        raise ValueError(f"the {fault} fault")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault in ("sleep", "absent"):
        time.sleep(10_000)
    elif fault == "spin":
        # It takes ages and keeps the interpreter's lock: no other thread of Python's runs any more.
        re.match("(a+)+$", "a" * 80 + "b")
    elif fault == "leave":
        os._exit(0)
    elif fault == "oom":
        _eat_memory()


def _eat_memory() -> None:
    """Ask for memory until the limit of this process refuses it."""
    time.sleep(1.0)  # What is just being started would meet the limit first.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), before[1]))
    kept = []
    try:
        while True:
            kept.append(np.ones(1 << 23, np.uint8))
    finally:  # Other threads have to live on, to tell of it.
        kept.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)


def is_guilty() -> bool:
    """Is this the process that it befalls?"""
    return os.environ.get(contract.PROCESS_ID) == str(GUILTY)


def main(fault: str, num_steps: int = 100_000) -> None:
    """A sum over all processes, step after step."""
    if fault in AT_START and is_guilty():
        befall(fault)
    contract.report_progress(0, "init")
    import jax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    jax.distributed.initialize()
    mesh = Mesh(jax.devices(), ("data",))
    ones = jax.make_array_from_callback(
        (jax.device_count(),), NamedSharding(mesh, P("data")), lambda _: np.ones(1, np.float32)
    )
    total = jax.jit(jax.numpy.sum, out_shardings=NamedSharding(mesh, P()))
    for step in range(num_steps):
        contract.report_progress(step, "data")
        if step == AT_STEP and is_guilty():
            befall(fault)
        contract.report_progress(step, "step")
        assert float(total(ones)) == jax.device_count()
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1])
