"""Runs on TPU slices: real gcloud, real ssh, real processes; the API is a fake, the chips CPUs."""

HELLO = """
import os, sys
print("hello from", os.environ["MUSTER_PROCESS_ID"], os.uname().nodename, flush=True)
"""


def test_a_program_runs_on_every_host_and_the_slice_is_given_back(muster):
    done = muster.run("--process=all", program=HELLO)
    assert done.returncode == 0
    assert muster.there() == []
