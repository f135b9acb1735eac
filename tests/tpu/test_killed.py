"""The controller is killed after each request that it makes of the API: nothing is ever lost."""

import itertools
import os
import signal

import pytest

from launch.backends.tpu import ledger
from tests.testing.tpu_muster import TpuMuster

WORKERS = 6  # The requests are shared out among so many tests, which run side by side.
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


def check_all_is_on_record(muster: TpuMuster) -> None:
    """Everything that exists is in the run's ledger, as ours."""
    found = ledger.read(muster.workdir)
    owned = {name for one in (found.owned if found else []) for name in (one.name, *one.nodes)}
    assert set(muster.there()) <= owned


@pytest.mark.parametrize("first", range(WORKERS))
def test_after_every_request_gc_or_another_run_leaves_nothing(cloud, tmp_path, storage, first):
    for index in itertools.count(first, WORKERS):
        folder = tmp_path / f"after-{index}"
        folder.mkdir()
        muster = TpuMuster(
            folder / "code", cloud, storage, accelerator="v5litepod-4", tpu={"poll_seconds": 2.0}
        )
        if not kill_after(muster, index):
            assert index > 15, "a whole run makes more requests"
            break
        check_all_is_on_record(muster)
        if index % 4 == 1:  # It takes longer, and ends the same way.
            done = muster.run(program=QUICK)
            assert done.returncode == 0, (index, done.stderr)
            assert "hello" in done.stdout
        else:
            done = muster.other("gc")
            unattended = "goes on without a controller" in done.stdout
            assert done.returncode == 0, (index, done.stdout, done.stderr)
            if unattended:
                assert muster.other("stop", str(muster.workdir)).returncode == 0
        assert muster.there() == [], (index, done.stdout, done.stderr)
        assert muster.jobs() == []
