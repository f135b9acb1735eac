"""Runs whose directory is on gs://: trained there, and picked up from another machine."""

import json
import os
import signal
from pathlib import Path

import pytest

from launch import rundir
from launch.backends.tpu import published
from tests.testing.gangs import wait_until
from tests.testing.gcs import FakeGcs
from tests.testing.tpu_muster import TpuMuster
from tests.tpu.test_run import TRAIN

URL = "gs://muster-tests/runs/first"


@pytest.fixture
def bucket():
    storage = FakeGcs()
    storage.bucket("muster-tests")
    yield storage
    storage.close()


class BucketMuster(TpuMuster):
    """`muster` with a run on gs://, on one of several machines of the user's."""

    def __init__(self, folder: Path, cloud, storage, bucket: FakeGcs, machine: str):
        self.machine = machine
        self.bucket = bucket
        super().__init__(
            folder,
            cloud,
            storage,
            accelerator="v4-16",
            env=bucket.env | {"GCE_METADATA_HOST": bucket.url.removeprefix("http://")},
            tpu={"storage": None},
        )
        self.workdir = URL
        self.here = folder.parent / f"state-{machine}" / "remote" / URL.removeprefix("gs://")

    @property
    def env(self) -> dict[str, str]:
        return {
            **super().env,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{self.bucket.url}/storage/v1/",
            "MUSTER_STATE_DIR": str(self.folder.parent / f"state-{self.machine}"),
        }

    def records(self) -> dict:
        """What is published."""
        return json.loads(self.bucket.buckets["muster-tests"]["runs/first/muster.json"].data)


def test_a_run_in_a_bucket_trains_and_is_picked_up_from_another_machine(
    cloud, tmp_path, storage, bucket
):
    first = BucketMuster(tmp_path / "code", cloud, storage, bucket, "one")
    process = first.start(*TRAIN, "--config.num_steps=400")
    log = first.here / "attempts" / "000" / "process-00000.log"
    wait_until(lambda: log.exists() and "step 5/400" in log.read_text(), "step 5", 120.0)
    wait_until(lambda: "attempts/000/attempt.json" in first.records()["records"], "its records")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    other = BucketMuster(tmp_path / "code", cloud, storage, bucket, "two")
    status = json.loads(other.other("status", URL, "--json").stdout)
    assert status["state"] == "unattended"
    assert status["attempts"][0]["hosts"]
    done = other.other("stop", URL)
    assert done.returncode == 0, done.stderr
    record = rundir.attempt_record(other.here, 0)
    assert record["cause"] == "stopped", done.stderr
    assert other.there() == []
    names = bucket.names("muster-tests", "runs/first/")
    assert any(name.startswith("checkpoints/") for name in names)
    assert "metrics.jsonl" in names
    saved = record["last_step"]
    assert f"checkpoints/{saved}/commit_success.txt" in names, "it was saved before all went"
    assert rundir.exited_ids(rundir.attempt_path(other.here, 0)) == [0, 1]
    assert first.records()["owner"]["over"]


def test_a_run_that_is_looked_after_elsewhere_is_left_alone(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    owner = {"host": "another", "pid": 1, "time": "2000-01-01T00:00:00Z", "over": False}
    published._note(run, 3, owner)
    assert published.elsewhere(run) is None, "it was not heard of for long"
    monkeypatch.setattr(published.time, "time", lambda: 946684800.0 + 60)
    assert published.elsewhere(run) == owner
    published._note(run, 4, {**owner, "over": True})
    assert published.elsewhere(run) is None
    published._note(run, 4, {**owner, "host": os.uname().nodename})
    assert published.elsewhere(run) is None
