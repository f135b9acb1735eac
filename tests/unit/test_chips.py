"""Who holds a machine's chips: ours are ended, others named, what a dead process left is removed.

Files stand for the chips' devices; those who hold them are real processes.
"""

import os
import subprocess
import sys

import pytest

from launch import contract
from launch.agent import chips
from tests.testing.gangs import wait_until

HOLDS = "import sys, time; file = open(sys.argv[1]); print('holds', flush=True); time.sleep(60)"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of two chips; its folder."""
    for name in ("accel0", "accel1", "lockfile"):
        (tmp_path / name).touch()
    monkeypatch.setattr(chips, "_DEVICES", (f"{tmp_path}/accel*",))
    monkeypatch.setattr(chips, "_LOCK_FILES", (f"{tmp_path}/lockfile",))
    return tmp_path


@pytest.fixture
def hold(machine):
    """Starts a process that holds one of the machine's files."""
    started = []

    def start(name, **env):
        popen = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(machine / name)],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
        )
        started.append(popen)
        assert popen.stdout.readline() == b"holds\n"
        return popen

    yield start
    for popen in started:
        popen.kill()
        popen.wait()


def test_an_earlier_attempts_processes_are_ended_and_their_lock_file_removed(machine, hold):
    ours = [hold(name, **{contract.RUN_DIR: "/home/u/.muster/runs/mine"}) for name in
            ("accel1", "lockfile")]  # fmt: skip
    # A zombie still has its id, but no files: it counts as ended.
    assert chips.free("mine") == sorted(popen.pid for popen in ours)
    wait_until(lambda: all(popen.poll() == -9 for popen in ours), "their end")
    assert not (machine / "lockfile").exists()
    assert chips.free("mine") == []


@pytest.mark.parametrize("env", [{}, {contract.RUN_DIR: "/home/u/.muster/runs/another"}])
def test_somebody_elses_process_is_named_and_lives_on(machine, hold, env):
    theirs = hold("accel0", **env)
    with pytest.raises(
        chips.HeldError, match=f"process {theirs.pid} holds the TPU chips: .*python"
    ):
        chips.free("mine")
    assert theirs.poll() is None
    assert (machine / "lockfile").exists()


def test_what_a_dead_process_has_left_is_removed(machine):
    assert chips.free("mine") == []
    assert not (machine / "lockfile").exists()
    assert (machine / "accel0").exists()
