"""The controller is killed after whatever it asks of the API: nothing is ever lost.

The moments: when a request has changed something, and when another gcloud asks something else than
the one before. Between them nothing changes, in the cloud or in the controller, which waits.
"""

import itertools
import os
import signal
from collections.abc import Mapping

import pytest

from launch.backends.tpu import ledger
from tests.testing.tpu_api_methods import Request
from tests.testing.tpu_muster import TpuMuster

WORKERS = 2  # The moments are shared out among so many tests, which run side by side.
QUICK = "import time; time.sleep(3); print('hello')"


def is_moment(last: Request | None, request: Request) -> bool:
    """Whether it differs from what came just before."""
    if request.changes or last is None:
        return True
    asks_else = (request.method, request.path) != (last.method, last.path)
    return asks_else and request.command != last.command


def kill_after(muster: TpuMuster, moment: int) -> bool:
    """Run, and kill the controller at this moment, before the API's answer is there; False if the
    run was over before."""
    api = muster.cloud.api
    process = muster.start(program=QUICK)
    moments = 0
    last: Request | None = None

    def kill(request: Request) -> None:
        nonlocal moments, last
        if is_moment(last, request):
            if moments == moment:
                os.kill(process.pid, signal.SIGKILL)
            moments += 1
        last = request

    api.on_request = kill
    try:
        out, err = process.communicate(timeout=120)
    finally:
        api.on_request = None
    assert process.returncode in (0, -signal.SIGKILL), (out, err)
    return process.returncode == -signal.SIGKILL


def check_all_is_on_record(killed: Mapping[int, TpuMuster]) -> None:
    """Everything that exists is in a run's ledger, as ours."""
    ledgers = [ledger.read(muster.workdir) for muster in killed.values()]
    owned = [one for found in ledgers if found for one in found.owned]
    names = {name for one in owned for name in (one.name, *one.nodes)}
    assert set(next(iter(killed.values())).there()) <= names


@pytest.mark.parametrize("first", range(WORKERS))
def test_after_every_moment_gc_or_another_run_leaves_nothing(cloud, tmp_path, storage, first):
    killed: dict[int, TpuMuster] = {}
    for moment in itertools.count(first, WORKERS):
        muster = TpuMuster(
            tmp_path / f"after-{moment}",
            cloud,
            storage,
            accelerator="v5litepod-4",
            tpu={"poll_seconds": 2.0},
        )
        if not kill_after(muster, moment):
            assert moment > 7, "there are more in a whole run"
            break
        killed[moment] = muster
        check_all_is_on_record(killed)
    # One of them goes on; it takes longer, and ends the same way.
    [again, *others] = killed.values()
    done = again.run(program=QUICK)
    assert done.returncode == 0, done.stderr
    assert "hello" in done.stdout
    collected = again.other("gc")
    assert collected.returncode == 0, (collected.stdout, collected.stderr)
    for muster in others:
        if f"({muster.run_id}): goes on without a controller" in collected.stdout:
            assert muster.other("stop", str(muster.workdir)).returncode == 0
    assert again.there() == [], (collected.stdout, collected.stderr)
    assert again.jobs() == []
