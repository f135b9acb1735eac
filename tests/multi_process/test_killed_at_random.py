"""The launcher or an agent is killed at random moments: nothing survives the lease, no record is
torn, and the next `muster run` goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

from launch import contract, rundir
from tests.testing.gangs import MusterCommand, wait_until

ROUNDS = 20
# Counts up in a file of its own, whatever happens; ignores our signals, and has a child.
PROGRAM = """
    import os, pathlib, signal, subprocess, sys, time
    from launch.contract import report_progress, write_atomically
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "600"])
    saved = pathlib.Path(os.environ["MUSTER_RUN_DIR"], "saved-" + os.environ["MUSTER_PROCESS_ID"])
    step = int(saved.read_text()) if saved.exists() else 0
    while True:
        report_progress(step, "data")
        step += 1
        write_atomically(saved, str(step))
        report_progress(step, "step")
        time.sleep(0.01)
"""


def check_records(run: Path) -> None:
    """Every record is whole."""
    records = [path for path in run.rglob("*.json") if not path.name.endswith("progress.json")]
    assert records
    for path in records:
        assert isinstance(json.loads(path.read_text()), dict), path


def test_twenty_deaths_of_launcher_or_agent_leave_nothing_and_the_run_goes_on(tmp_path):
    chance = random.Random(4)
    muster = MusterCommand(
        tmp_path, hosts=2, processes_per_host=1, lease_seconds=6.0, grace_seconds=1.0
    )
    reached = 0
    for number in range(ROUNDS):
        victim = chance.choice(["launcher", "detached launcher", "agent"])
        detached = victim == "detached launcher"
        process = muster.start(*["--detach"] * detached, program=PROGRAM)
        if detached:
            process.communicate(timeout=60)
        # From before the agents are there to the middle of the work.
        delay = chance.choice([0.0, 0.05, 0.3]) * chance.random()
        at = rundir.attempt_path(muster.workdir, number)
        wait_until(lambda at=at: (at / rundir.ATTEMPT_RECORD).exists(), "the attempt to begin")
        if victim == "agent" or chance.random() < 0.7:
            wait_until(lambda: len(muster.agents()) == 2, "the agents")
        time.sleep(delay)
        if victim == "agent":
            os.kill(muster.agent_of(chance.choice(["local0", "local1"])), signal.SIGKILL)
        else:
            owner = rundir.owner(muster.workdir)
            assert owner is not None
            os.kill(owner["pid"], signal.SIGKILL)
        if not detached:
            process.communicate(timeout=60)
        muster.check_nothing_is_left()
        check_records(muster.workdir)
        saved = [muster.workdir / f"saved-{i}" for i in range(2)]
        steps = [int(path.read_text()) if path.exists() else 0 for path in saved]
        assert min(steps) >= reached
        reached = min(steps)
    assert reached > 0
    done = muster.run(program="print('whole')")
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr
    causes = [muster.attempt(number)["cause"] for number in range(ROUNDS + 1)]
    assert set(causes[:-1]) <= {"killed", "host_lost"}
    assert causes[-1] == "completed"
    assert contract.CONTROLLER_LOG in os.listdir(muster.workdir)
