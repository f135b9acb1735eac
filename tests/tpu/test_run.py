"""Runs on TPU slices: real gcloud, real ssh, real processes; the API is a fake, the chips CPUs."""

import json

import pytest

from tests.testing.gangs import ROOT
from tests.testing.tpu_muster import TpuMuster

HELLO = """
import os
print("hello from", os.environ["MUSTER_PROCESS_ID"], os.uname().nodename, flush=True)
names = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
print("slice", [os.environ.get(name) for name in names])
"""
TRAIN = (
    f"--config={ROOT}/configs/lm_bytes.py",
    "--config.num_steps=4",
    "--config.global_batch_size=4",
    "--config.model.dim=32",
    "--config.model.num_layers=1",
    "--config.model.mlp_dim=64",
    "--config.data.seq_len=32",
    "--config.eval.every_steps=0",
    "--config.checkpoint.every_steps=2",
    "--config.log_every_steps=1",
    f"--config.data.path={ROOT}/LICENSE",
)


def test_four_hosts_train_together_and_the_slice_is_given_back(cloud, tmp_path, storage):
    tpu = {"price_per_chip_hour": 2.0}
    muster = TpuMuster(tmp_path / "code", cloud, storage, tpu=tpu)
    done = muster.run(*TRAIN)
    assert done.returncode == 0, done.stderr
    assert "4 process(es), 4 cpu devices" in done.stdout
    assert "done at step 4" in done.stdout
    kept = muster.storage / f"run-{muster.run_id}"
    assert sorted(path.name for path in (kept / "checkpoints").iterdir()) == ["2", "4"]
    losses = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "loss" in line] == [1, 2, 3, 4]
    record = muster.attempt()
    assert (record["cause"], record["last_step"]) == ("completed", 4)
    assert record["backend_ids"] == [f"muster-{muster.run_id}-0"]
    status = json.loads(muster.other("status", str(muster.workdir), "--json").stdout)
    assert status["machines"]["open"] == []
    assert status["machines"]["chip_hours"] > 0
    assert status["machines"]["cost"] == pytest.approx(2 * status["machines"]["chip_hours"])
    assert muster.there() == []
    assert muster.jobs() == []


def test_two_slices_know_of_one_another(cloud, tmp_path, storage):
    muster = TpuMuster(tmp_path / "code", cloud, storage, accelerator="v4-16", slices=2)
    done = muster.run("--process=all", program=HELLO)
    assert done.returncode == 0, done.stderr
    slices = [line.partition("] slice ")[2] for line in done.stdout.splitlines() if "slice" in line]
    assert len(slices) == 4
    coordinators = {text.rpartition(", ")[2] for text in slices}
    assert len(coordinators) == 1
    assert coordinators.pop().endswith(":8081']")
    ids = [text.split(", ")[1] for text in sorted(slices)]
    assert ids == ["'0'", "'0'", "'1'", "'1'"]
    assert all(text.startswith("['2', ") for text in slices)
    created = [request for request in muster.cloud.api.mutations() if request.method == "POST"]
    assert len([request for request in created if "queuedResources" in request.path]) == 1
    assert muster.there() == []
