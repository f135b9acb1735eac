"""Trainings of two processes whose run directory is on Google Cloud Storage (a fake of it)."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.multi_process.test_checkpoint_gang import RESTORE, SAVE
from tests.testing import tiny
from tests.testing.gang import gang
from tests.testing.gcs import FakeGcs, shared
from tests.testing.packages import required_package

# Not imported yet: that must not happen before the fixture has set the environment.
if importlib.util.find_spec("gcsfs") is None:
    required_package("gcsfs")

BUCKET = "bucket-2"
RUN = f"gs://{BUCKET}/runs/a"
TRAIN = f"""
import os, sys
sys.argv = ["trainer.main", "--config={tiny.ROOT}/tests/testing/configs/tiny.py:witness"]
sys.argv += os.environ["FLAGS"].split()
from trainer.main import main
main()
"""


@pytest.fixture
def gcs(monkeypatch) -> Iterator[FakeGcs]:
    """The storage, with one empty bucket."""
    server = shared()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    server.bucket(BUCKET)
    server.requests.clear()
    yield server
    server.forgive()


def flags(workdir: object) -> dict[str, str]:
    return {
        "FLAGS": f"--workdir={workdir} --config.num_steps=6 --config.checkpoint.every_steps=2 "
        "--config.checkpoint.keep_last=2"
    }


def metrics(gcs: FakeGcs) -> dict[int, float]:
    lines = gcs.buckets[BUCKET]["runs/a/metrics.jsonl"].data.decode().splitlines()
    losses = [(record["step"], record["loss"]) for record in map(json.loads, lines)]
    assert len(dict(losses)) == len(losses), "a step is there twice"
    return dict(losses)


def test_a_training_killed_in_a_save_goes_on_through_an_outage_as_if_nothing_had_been(
    gcs, tmp_path: Path
):
    with gang(TRAIN, 2, tmp_path / "straight", env=flags(tmp_path / "run")) as straight:
        straight.succeed()
    with (
        gcs.hold("POST .*name=runs/a/checkpoints/4/commit_success", lose=True),
        gang(TRAIN, 2, tmp_path / "killed", env=flags(RUN)) as killed,
    ):
        gcs.wait_for("POST .*name=runs/a/checkpoints/4/commit_success", 60)
        killed.kill(signal.SIGKILL)
    assert gcs.names(BUCKET, "runs/a/checkpoints/4/")
    assert max(metrics(gcs)) >= 4, "what was logged up to a commit comes before it"
    gcs.fail(503, 1, "GET .*checkpoints")
    gcs.fail(503, 2, "POST .*name=.*/state/")
    gcs.fail(429, 1, "POST .*name=.*metrics.jsonl")
    with gang(TRAIN, 2, tmp_path / "resumed", env=flags(RUN)) as resumed:
        resumed.succeed()
        assert f"resumed from step 2 ({RUN}/checkpoints/2)" in resumed.log(0), resumed.logs()
        assert "checkpoints/4 was never finished" in resumed.log(0), resumed.logs()
    assert gcs.failures_left() == 0

    steps = {name.split("/")[0] for name in gcs.names(BUCKET, "runs/a/checkpoints/")}
    assert steps == {"4", "6", "verified.json"}
    one, two = tiny.read_state(tmp_path / "run", 6), tiny.read_state(RUN, 6)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value, err_msg=name)
    losses = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert metrics(gcs) == {r["step"]: r["loss"] for r in map(json.loads, losses)}
    for name in ("config.json", "ledger.json"):
        assert json.loads(gcs.buckets[BUCKET][f"runs/a/{name}"].data) == json.loads(
            (tmp_path / "run" / name).read_text()
        )
    assert sum("/events." in name for name in gcs.names(BUCKET)) == 2


def test_a_bucket_that_cannot_be_written_is_told_by_all_in_one_line(gcs, tmp_path):
    gcs.forbid_writes(BUCKET)
    with gang(TRAIN, 2, tmp_path, env=flags(RUN)) as refused:
        assert refused.wait() == {0: 2, 1: 2}, refused.logs()
        for process in (0, 1):
            log = refused.log(process)
            (line,) = [line for line in log.splitlines() if line.startswith("error:")]
            assert line.startswith(f"error: --workdir='{RUN}': cannot be written: access is denied")
            assert "choose another --workdir" in line
            assert "Traceback" not in log


def test_damage_in_one_processs_share_is_heeded_by_all(gcs, tmp_path):
    env = {"CHECKPOINTS": f"{RUN}/checkpoints"}
    with gang(SAVE, 2, tmp_path / "save", devices_per_process=2, env=env) as saved:
        saved.succeed()
    step = "runs/a/checkpoints/2/"
    victims = [
        name for name in gcs.names(BUCKET) if name.startswith(f"{step}state/ocdbt.process_1")
    ]
    assert victims, "process 1 wrote nothing of its own"
    victim = max(victims, key=lambda name: len(gcs.buckets[BUCKET][name].data))
    gcs.flip(BUCKET, victim, -1)
    with gang(RESTORE, 2, tmp_path / "restore", env=env) as restored:
        restored.succeed()
        assert all("restored 1 " in restored.log(process) for process in (0, 1)), restored.logs()
        assert victim.removeprefix(step) in restored.log(0), restored.logs()
        read = [r for r in gcs.requests if f"GET /download/storage/v1/b/{BUCKET}/o/{victim}" in r]
        assert len(read) == 1, "each process must read its share alone"
    assert gcs.names(BUCKET, "runs/a/checkpoints/damaged/2-0/")
