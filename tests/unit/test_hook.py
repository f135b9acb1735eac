"""The hook that every Python of a gang's process imports at its start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launch import contract
from launch.agent.process import STACKS_SIGNAL_OFFSET
from launch.backends.host_plan import HOOK_DIRECTORY


class Hooked:
    """Runs programs as the agent would."""

    def __init__(self, folder: Path):
        self.failure = folder / "failure.json"
        self.progress = folder / "progress.json"
        self.stacks = folder / "stacks.txt"
        self._folder = folder
        self.path = [str(HOOK_DIRECTORY)]
        self.env = {
            contract.FAILURE_FILE: str(self.failure),
            contract.PROGRESS_FILE: str(self.progress),
            contract.STACKS_FILE: str(self.stacks),
        }

    def run(self, program: str) -> subprocess.CompletedProcess[str]:
        inherited = {n: v for n, v in os.environ.items() if not n.startswith("MUSTER_")}
        env = {**inherited, **self.env, "PYTHONPATH": os.pathsep.join(self.path)}
        file = self._folder / "program.py"
        file.write_text(textwrap.dedent(program))
        return subprocess.run(
            [sys.executable, str(file)], env=env, text=True, capture_output=True, check=False
        )

    def recorded(self) -> dict | None:
        return json.loads(self.failure.read_text()) if self.failure.exists() else None


@pytest.fixture
def hooked(tmp_path: Path) -> Hooked:
    return Hooked(tmp_path)


def test_an_uncaught_exception_is_recorded_and_still_printed_by_a_program_without_muster(hooked):
    done = hooked.run(
        """
        class Wrong(Exception):
            accuses = (3,)
        def deep():
            raise Wrong("no good")
        deep()
        """
    )
    assert (done.returncode, "Wrong: no good" in done.stderr) == (1, True)
    found = hooked.recorded()
    assert (found["type"], found["message"], found["accuses"]) == ("Wrong", "no good", [3])
    assert "in deep" in found["traceback"]
    assert found["traceback"].splitlines() == done.stderr.splitlines()


@pytest.mark.parametrize("ending", ["raise SystemExit(3)", "raise KeyboardInterrupt", "pass"])
def test_other_ends_are_no_failures(hooked, ending):
    hooked.run(ending)
    assert hooked.recorded() is None


@pytest.mark.parametrize(
    "start",
    [
        "multiprocessing.get_context('spawn').Process(target=fail).start()",
        "multiprocessing.get_context('fork').Process(target=fail).start()",
        "subprocess.run([sys.executable, '-c', 'raise ValueError(1)'])",
        "os.fork() or fail()",
    ],
)
def test_what_befalls_a_child_is_not_told_of_the_process_itself(hooked, start):
    hooked.run(
        f"""
        import multiprocessing, os, subprocess, sys
        def fail():
            raise ValueError("in a child")
        if __name__ == "__main__":
            {start}
        """
    )
    assert hooked.recorded() is None


def test_a_program_below_a_shell_is_watched(hooked):
    hooked.run(
        """
        import os, sys
        if len(sys.argv) == 1:
            os.execv(sys.executable, [sys.executable, __file__, "again"])
        raise ValueError("after exec")
        """
    )
    assert hooked.recorded()["message"] == "after exec"


def test_leaving_is_told_before_the_handlers_of_atexit_run(hooked):
    done = hooked.run(
        """
        import atexit, json, os
        path = os.environ["MUSTER_PROGRESS_FILE"]
        atexit.register(lambda: print(open(path).read()))
        open(path, "w").write(json.dumps({"step": 4, "phase": "step", "mine": [1]}))
        """
    )
    assert json.loads(done.stdout) == {"step": 4, "phase": "exit", "mine": [1]}


def test_who_never_reported_does_not_report_its_leaving(hooked):
    hooked.run("pass")
    assert not hooked.progress.exists()


@pytest.mark.parametrize("body", ["print('theirs')", "print('theirs'); raise ValueError('bad')"])
def test_the_sitecustomize_that_it_hides_is_run_all_the_same(hooked, tmp_path, body):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text(body + "\n")
    hooked.path.append(str(tmp_path / "other"))
    done = hooked.run("import sitecustomize; print(sitecustomize.__file__)")
    assert done.stdout.splitlines()[0] == "theirs"
    assert ("bad" in done.stderr) == ("bad" in body)
    if "bad" not in body:
        assert done.stdout.splitlines()[1] == str(tmp_path / "other" / "sitecustomize.py")


def test_without_its_environment_it_does_nothing(hooked):
    hooked.env = {}
    done = hooked.run(
        "import faulthandler, sys; print(faulthandler.is_enabled(), sys.excepthook.__module__)"
    )
    assert done.stdout.split() == ["False", "sys"]


def test_agent_and_hook_mean_the_same_signal():
    text = (HOOK_DIRECTORY / "sitecustomize.py").read_text()
    assert f"STACKS_SIGNAL_OFFSET = {STACKS_SIGNAL_OFFSET} " in text
