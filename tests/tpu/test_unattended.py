"""Runs whose controller is gone: they go on, are taken over, stopped, and end by themselves."""

import http.server
import json
import os
import signal
import threading

import pytest

from launch import rundir
from tests.testing.gangs import wait_until
from tests.testing.tpu_muster import TpuMuster

# Counts on until a file in storage says that it is enough; a process tells when it is told to stop.
COUNTS = """
import os, signal, sys, time
from launch import contract
me = os.environ["MUSTER_PROCESS_ID"]
storage = os.environ["MUSTER_STORAGE_DIR"]
os.makedirs(storage, exist_ok=True)
def told(*_):
    open(f"{storage}/told-{me}", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, told)
for step in range(1, 10000):
    contract.report_progress(step)
    print("line", step, flush=True)
    if os.path.exists(f"{storage}/enough"):
        break
    time.sleep(0.05)
print("the end of", me, os.getpid(), flush=True)
"""


def storage_of(muster: TpuMuster):
    return muster.storage / f"run-{muster.run_id}"


HOSTS = 2


def start_and_kill(muster: TpuMuster, step: int = 20) -> None:
    """Start a run that counts, and kill its controller when every process has counted so far."""
    process = muster.start(program=COUNTS)
    try:
        wait_until(
            lambda: all(f"line {step}\n" in muster.log(i) for i in range(HOSTS)), "all to count"
        )
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def numbers(log: str) -> list[int]:
    return [int(line.split()[1]) for line in log.splitlines() if line.startswith("line ")]


def test_a_run_goes_on_without_its_controller_and_is_taken_over(gang):
    muster = gang()
    start_and_kill(muster)
    seen = muster.cloud.api.mutations()
    status = json.loads(muster.other("status", str(muster.workdir), "--json").stdout)
    assert status["state"] == "unattended"
    assert [one["state"] for one in status["machines"]["open"]] == ["ACTIVE"]
    text = muster.other("status", str(muster.workdir)).stdout
    assert f"queued resource {status['machines']['open'][0]['name']}" in text
    gone_on = len(muster.log(0))
    process = muster.start(program=COUNTS)
    wait_until(lambda: len(muster.log(0)) > gone_on + 1000, "its lines to come again")
    (storage_of(muster) / "enough").touch()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "attempt 0 goes on on 2 hosts: taken over" in err
    assert rundir.attempt_numbers(muster.workdir) == [0]
    assert muster.attempt()["cause"] == "completed"
    for process_id in range(HOSTS):
        counted = numbers(muster.log(process_id))
        assert counted == list(range(1, len(counted) + 1)), "no line is lost, and none comes twice"
        assert f"the end of {process_id}" in muster.log(process_id)
    created = [r.path for r in muster.cloud.api.mutations()[len(seen) :] if r.method == "POST"]
    assert not any("queuedResources" in path for path in created)
    assert muster.there() == []


def test_a_run_that_ended_meanwhile_is_brought_to_its_end(gang):
    muster = gang()
    start_and_kill(muster)
    (storage_of(muster) / "enough").touch()
    wait_until(lambda: not any("program.py" in job for job in muster.jobs()), "the end")
    done = muster.run(program=COUNTS)
    assert done.returncode == 0, done.stderr
    assert muster.attempt()["cause"] == "completed"
    assert all(f"the end of {i}" in muster.log(i) for i in range(HOSTS))
    assert rundir.attempt_numbers(muster.workdir) == [0]
    assert muster.there() == []


def test_stop_has_an_unattended_run_saved_and_its_machines_given_back(gang):
    muster = gang()
    start_and_kill(muster)
    assert "unattended" in muster.other("list").stdout
    done = muster.other("stop", str(muster.workdir))
    assert done.returncode == 0, done.stderr
    assert muster.attempt()["cause"] == "stopped"
    assert sorted(path.name for path in storage_of(muster).iterdir()) == [
        f"told-{i}" for i in range(HOSTS)
    ]
    assert muster.there() == []
    assert muster.jobs() == []


@pytest.fixture
def metadata(cloud):
    """A metadata server, as a VM has one; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            token = {"access_token": "of-the-machine", "expires_in": 3600}
            data = json.dumps(token).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_machines_on_which_all_has_ended_are_given_back_from_the_inside_if_nobody_comes(
    cloud, gang, metadata
):
    muster = gang(env={"GCE_METADATA_HOST": metadata}, tpu={"idle_seconds": 3.0})
    start_and_kill(muster)
    assert muster.there()
    (storage_of(muster) / "enough").touch()
    wait_until(lambda: muster.there() == [], "the machines to be given back", 60.0)
    deleted = [request for request in cloud.api.mutations() if request.method == "DELETE"]
    assert "gcloud" not in deleted[0].user_agent
    assert muster.jobs() == []
