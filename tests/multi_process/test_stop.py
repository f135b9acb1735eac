"""A stop is honoured whatever the processes do, and says what is kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import contract, rundir
from tests.testing import tiny
from tests.testing.gangs import MusterCommand, command_line

CONFIG = "tests/testing/configs/stalling.py"


@pytest.fixture
def stalled(tmp_path: Path):
    """Start a training, wait until it has come to a stand, and stop it; its output."""
    made = []

    def stop(where: str, *flags: str, processes: int = 2, alone: int = -1, **cluster: Any):
        muster = MusterCommand(tmp_path, processes_per_host=processes, **cluster)
        made.append(muster)
        config = (f"--config={tiny.ROOT}/{CONFIG}:{where}", f"--config.data.process={alone}")
        attempt = len(rundir.attempt_numbers(muster.workdir))
        process = muster.start(*config, *flags)
        for i in range(processes):
            if alone in (-1, i):
                muster.wait_for(f"stalls in {where}", i, attempt)
        if where == "data":  # It is read ahead.
            muster.wait_for("step 10/", 0)
        if "grace_seconds" in cluster:
            assert muster.other("stop", str(muster.workdir)).returncode == 0
        else:  # One process alone is told.
            victim = next(pid for pid in muster.left() if b"trainer.main" in command_line(pid))
            os.kill(victim, signal.SIGTERM)
        out, err = process.communicate(timeout=180)
        assert process.returncode == contract.EXIT_RESUMABLE, out + err
        return muster, out

    yield stop
    for muster in made:
        muster.check_nothing_is_left()


@pytest.mark.parametrize("alone", [-1, 1])
def test_in_a_compilation_all_leave_at_once(stalled, alone):
    muster, out = stalled("compile", alone=alone)
    assert "told to stop before the loop began: nothing is lost" in out
    assert not list((muster.workdir / contract.CHECKPOINTS).iterdir())


def test_in_a_restore_all_leave_at_once_and_what_is_restored_stays(stalled, tmp_path):
    first = MusterCommand(tmp_path, processes_per_host=1)
    done = first.run(f"--config={tiny.ROOT}/{CONFIG}:restore", "--config.num_steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    muster, out = stalled("restore")
    assert "told to stop before the loop began: nothing is lost" in out
    assert int(tiny.read_state(muster.workdir, 1)["model.seen"]) == tiny.fingerprint(1)


def test_a_wait_for_data_ends_and_all_that_was_done_is_saved(stalled):
    muster, out = stalled("data")
    found = re.search(r"told to stop: step (\d+) is saved", out)
    assert found, out
    step = int(found[1])
    # 100 rows, twice, in batches of 16; what is read ahead may stall before the loop is there.
    assert 1 <= step <= 12
    assert int(tiny.read_state(muster.workdir, step)["model.seen"]) == tiny.fingerprint(step)


def test_an_evaluation_is_left_and_the_step_before_it_saved(stalled):
    muster, out = stalled("eval")
    assert "told to stop: step 7 is saved" in out
    assert int(tiny.read_state(muster.workdir, 7)["model.seen"]) == tiny.fingerprint(7)


def test_what_cannot_be_saved_in_time_is_told(stalled):
    """One process waits for data that another has: no step can end on all of them any more."""
    _, out = stalled("data", alone=1, grace_seconds=12.0)
    found = re.search(r"the time for it is over: step 10 is kept, (\d+) steps? (is|are) lost", out)
    assert found, out
    assert int(found[1]) in (2, 3, 4)


def test_a_process_alone_stops_in_a_compilation_by_one_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "trainer.main", f"--config={CONFIG}:compile"]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path}"], cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "stalls in compile" in line:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == contract.EXIT_RESUMABLE
    assert "told to stop before the loop began: nothing is lost" in out
