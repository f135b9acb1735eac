"""One process of four ruins the gang, in every way we know: the right one is named, with the right
cause, soon, and nothing is left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from launch import rundir
from tests.testing import faults
from tests.testing.gangs import ROOT, MusterCommand

# Short limits, so that hangs are seen soon; docs/watching.md tells the times.
WATCH = {
    "start_seconds": 8.0,
    "init_seconds": 40.0,  # Many gangs may be starting at once; only `absent` waits for it.
    "compile_seconds": 40.0,
    "data_seconds": 4.0,
    "step_min_seconds": 4.0,
    "step_medians": 5.0,
}
CAUSES = {
    "raise": "exception",
    "kill": "killed",
    "stop": "hang",
    "sleep": "hang",
    "spin": "hang",
    "leave": "exception",
    "oom": "oom",
    "import": "exception",
    "absent": "start_timeout",
}
# What the user must be told.
WORDS = {
    "raise": "ValueError: the raise fault",
    "kill": "SIGKILL",
    "stop": "stopped",
    "sleep": "befall",
    "spin": "main thread is in match",
    "leave": "exit code 0",
    "oom": "memory",
    "import": "ValueError: the import fault",
    "absent": "never reported",
}
# Its main thread waits for the thread that reads ahead, which is the one with the fault; and it
# reports before it loads the task, which never comes to its end.
CAUSES_OF_TRAINER = {**CAUSES, "absent": "hang"}
WORDS_OF_TRAINER = {**WORDS, "sleep": "(data)", "spin": "hangs", "absent": "(init)"}


class FourProcesses(MusterCommand):
    """Four processes on two hosts, of which one has a fault."""

    def __init__(self, folder: Path, **cluster: Any):
        shape = {"hosts": 2, "processes_per_host": 2, "devices_per_process": 1}
        super().__init__(folder, **{**shape, "watch": WATCH, "grace_seconds": 5.0, **cluster})

    def check(self, done: Any, cause: str, words: str) -> None:
        """The verdict is told and recorded, and nothing is left."""
        self.check_nothing_is_left()
        text = f"{done.stdout}\n{done.stderr}"
        record = self.attempt()
        assert (record["cause"], record["guilty_process"]) == (cause, faults.GUILTY), text
        assert record["guilty_host"] == "local1"
        assert done.returncode == 1
        assert f"process {faults.GUILTY}/4 on local1" in done.stderr
        assert words in done.stderr, text
        assert words in record["explanation"] + record["message"], record
        for process_id in range(4):
            path = rundir.exit_path(rundir.attempt_path(self.workdir, 0), process_id)
            ended = rundir.read_record(path)
            assert ended is not None
            assert ended["process_id"] == process_id


@pytest.mark.parametrize("fault", [*faults.AT_START, *faults.IN_LOOP])
def test_of_four_processes_that_sum_the_one_with_the_fault_is_named(fault, tmp_path):
    muster = FourProcesses(tmp_path)
    program = ["--", sys.executable, "-m", "tests.testing.faults", fault]
    muster.check(muster.run(*program), CAUSES[fault], WORDS[fault])


@pytest.mark.parametrize("fault", [*faults.AT_START, *faults.IN_LOOP])
def test_of_four_processes_that_train_the_one_with_the_fault_is_named(fault, tmp_path):
    muster = FourProcesses(tmp_path)
    config = f"--config={ROOT}/tests/testing/configs/faulty.py:{fault}"
    muster.check(muster.run(config), CAUSES_OF_TRAINER[fault], WORDS_OF_TRAINER[fault])
