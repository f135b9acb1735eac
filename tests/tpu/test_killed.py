"""The controller is killed after each request that it makes of the API: nothing is ever lost."""

import itertools
import os
import signal
from collections.abc import Mapping

import pytest

from launch.backends.tpu import ledger
from tests.testing.tpu_muster import TpuMuster

WORKERS = 4  # The requests are shared out among so many tests, which run side by side.
QUICK = "import time; time.sleep(3); print('hello')"


def kill_after(muster: TpuMuster, index: int) -> bool:
    """Run, and kill the controller when the API has dealt with its request of this index, before
    it is answered; False if the run was over before."""
    api = muster.cloud.api
    first = len(api.requests)
    process = muster.start(program=QUICK)

    def kill(request):
        if request.index - first >= index and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)

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
def test_after_every_request_gc_or_another_run_leaves_nothing(cloud, tmp_path, storage, first):
    killed: dict[int, TpuMuster] = {}
    for index in itertools.count(first, WORKERS):
        muster = TpuMuster(
            tmp_path / f"after-{index}",
            cloud,
            storage,
            accelerator="v5litepod-4",
            tpu={"poll_seconds": 2.0},
        )
        if not kill_after(muster, index):
            assert index > 15, "a whole run makes more requests"
            break
        killed[index] = muster
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
