"""Processes that are not about to run the same training end before the first step, and say why."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from launch import contract, rundir
from tests.testing.configs import odd
from tests.testing.gangs import ROOT, MusterCommand

TOLD = {
    "start": (
        "config.optimizer.adamw.learning_rate is 0.001 on process 1, 0.01 on the others",
        f"flax is 0.0.1 on process 1, {metadata.version('flax')} on the others",
        "trainer/step.py differs on process 1",
    ),
    "program": ("the training step's program differs on process 0",),
}


@pytest.mark.parametrize("what", TOLD)
def test_of_three_processes_the_one_that_differs_is_named_with_what_differs(what, tmp_path: Path):
    stale = tmp_path / "stale"
    stale.mkdir()
    (stale / "step.py").write_text((ROOT / "trainer/step.py").read_text() + "# Another.\n")
    env = {odd.STALE_CODE: str(stale)}
    muster = MusterCommand(tmp_path, processes_per_host=3, restart={"max_failures": 3}, env=env)
    done = muster.run(f"--config={ROOT}/tests/testing/configs/odd.py:{what}")
    muster.check_nothing_is_left()
    assert done.returncode == contract.EXIT_CONFIG, done.stderr
    record = muster.attempt()
    assert (record["cause"], record["guilty_process"]) == ("config", odd.ODD[what]), record
    for words in TOLD[what]:
        assert words in done.stderr
        assert words in record["message"]
        assert all(words in muster.log(process) for process in range(3)), muster.log(2)
    assert "step 1/" not in done.stdout
    assert not rundir.attempt_path(muster.workdir, 1).exists()
