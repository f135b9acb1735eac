"""Runs on TPU slices: real gcloud, real ssh, real processes; the API is a fake, the chips CPUs."""

from tests.testing.gangs import ROOT
from tests.testing.tpu_muster import TpuMuster

HELLO = """
import os, sys
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


def test_four_hosts_train_together_and_the_slice_is_given_back(muster):
    done = muster.run(*TRAIN)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    assert muster.there() == []


def test_two_slices_know_of_one_another(cloud, tmp_path, storage):
    muster = TpuMuster(tmp_path / "code", cloud, storage, slices=2)
    done = muster.run("--process=all", program=HELLO)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert muster.there() == []
