"""Eight CPU devices for the tests of this process; set before anything imports jax."""

import os
import signal
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Tests compile much and compute little: without LLVM's optimizations they take a fifth of the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# A user's Python keeps its bytecode; without it each process compiles all of Muster's.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["TPU_LOG_DIR"] = "disabled"  # Wherever libtpu is loaded, it would leave logs in /tmp.
# What tests start is none of the user's runs.
_STATE = tempfile.TemporaryDirectory(prefix="muster-tests-state-")
os.environ["MUSTER_STATE_DIR"] = _STATE.name
os.environ["MUSTER_CACHE_DIR"] = os.path.join(_STATE.name, "cache")
# Started by nohup or in the background of a script, these would be ignored by all tests start.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(
            _number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        )


# What takes longest, or waits most; all workers begin with some of it.
_LONG = ("tests/multi_process/test_chaos", "tests/tpu/test_killed", "tests/tpu/", "tests/slurm/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each worker long tests first, and then neighbours, which share fixtures.

    A worker gets a stretch of the list, and when it is done a part of another's
    (`--dist worksteal`).
    """

    def place(item: pytest.Item) -> int:
        starts = [i for i, start in enumerate(_LONG) if item.nodeid.startswith(start)]
        return min(starts, default=len(_LONG))

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items.sort(key=place)
    num_long = sum(place(item) < len(_LONG) for item in items)
    long, short = items[:num_long], items[num_long:]
    cuts = [len(short) * i // workers for i in range(workers + 1)]
    items[:] = [
        item for i in range(workers) for item in (*long[i::workers], *short[cuts[i] : cuts[i + 1]])
    ]
