"""Fifty faults, and a run that ends as if there had been none; scripts/chaos.py has more."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys

import pytest

from launch.agent.processes import die_with_parent
from tests.testing.chaos import schedule
from tests.testing.gangs import ROOT, environment

FAULTS, SEED = 50, 7
TIMEOUT_SECONDS = 1500  # Against hanging only: 2 minutes on a machine that does nothing else.


@pytest.mark.timeout(TIMEOUT_SECONDS + 60)
def test_fifty_faults_leave_the_same_params_moments_and_rngs_bit_for_bit(tmp_path):
    command = [sys.executable, "-m", "scripts.chaos", f"--faults={FAULTS}", f"--seed={SEED}"]
    command += [f"--folder={tmp_path / 'runs'}", f"--json={tmp_path / 'figures.json'}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        start_new_session=True,
        preexec_fn=die_with_parent(os.getpid()),
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout  # The schedule, what is wrong, how to play it again.

    figures = json.loads((tmp_path / "figures.json").read_text())
    came = collections.Counter(done["fault"]["kind"] for done in figures["deliveries"])
    assert came.total() == FAULTS
    absent = set(schedule.SHARES) - set(came)
    assert absent in (set(), set(schedule.NEEDS_MOUNTS)), absent
    # It was no calm run, and it did not get through by luck: it lost work, and did it again.
    assert {"killed", "host_lost"} <= set(figures["causes"])
    assert figures["starts"] > 3
    assert figures["steps_lost"] > 0
    assert 0 < figures["goodput"]["goodput"] < 1
    assert set(figures["goodput"]["shares"]) >= {"stepping", "lost_work", "down"}
