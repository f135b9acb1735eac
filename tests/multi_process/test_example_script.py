"""The example of a training loop of one's own: as a gang of two, and alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from launch import rundir
from tests.testing.gangs import ROOT, TIMEOUT_SECONDS, MusterCommand, environment

SCRIPT = ROOT / "scripts" / "example_nnx.py"
LAST_STEP = 100
LAST_LOSS = 0.01  # What a straight line leaves is 0.35.


def losses(text: str) -> dict[int, float]:
    """Step -> loss, of what the script printed."""
    found = re.findall(r"^step (\d+)/\d+  loss (\S+)$", text, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def test_the_example_trains_alike_on_two_processes_and_alone(tmp_path):
    muster = MusterCommand(tmp_path, devices_per_process=4)
    gang = muster.run(program=SCRIPT.read_text())
    assert gang.returncode == 0, gang.stdout + gang.stderr
    alone = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**environment(), "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr

    of_gang, of_one = losses(muster.log(0)), losses(alone.stdout)
    assert list(of_gang) == list(range(20, LAST_STEP + 1, 20))
    assert of_gang[LAST_STEP] < LAST_LOSS
    # Sums over another number of devices round differently; other rows differ by far more.
    assert of_gang == pytest.approx(of_one, rel=0.02, abs=2e-4)
    assert not losses(muster.log(1)), "only the lead prints"

    attempt = rundir.attempt_path(muster.workdir, 0)
    ends = [json.loads(rundir.progress_path(attempt, i).read_text()) for i in range(2)]
    assert [end["step"] for end in ends] == [LAST_STEP, LAST_STEP]
    assert ends[0]["loss"] == ends[1]["loss"]

    # 4 of the mesh's 8 devices are on its fsdp axis.
    assert "(4, 64), of which a device holds (4, 16)" in muster.log(0)
    assert "(4, 64), of which a device holds (4, 64)" in alone.stdout
    muster.check_nothing_is_left()
