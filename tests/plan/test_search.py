"""`muster plan --search` with real compiles, of a step that compiles in no time."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import contract
from tests.testing.gangs import ROOT, TIMEOUT_SECONDS, environment, wait_until
from tests.testing.plans import Files


class Searcher:
    """`muster plan` of tests/testing/configs/wide.py on four chips."""

    def __init__(self, folder: Path):
        self.files = Files(folder)
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._env = {
            **environment(),
            "MUSTER_CACHE_DIR": str(folder / "cache"),
            "TMPDIR": str(self.temporary),
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        config = f"--config={ROOT}/tests/testing/configs/wide.py"
        argv = ["-m", "launch", "plan", config, f"--cluster={self.files.cluster}", *words]
        return subprocess.Popen(
            [sys.executable, *argv], cwd=ROOT, env=self._env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture
def searcher(tmp_path):
    return Searcher(tmp_path)


def test_a_search_ends_with_a_way_that_fits_and_words_that_give_it(searcher):
    done = searcher.run("--search", "--compile=2", "--json")
    assert done.returncode == contract.EXIT_DONE, done.stderr
    found = json.loads(done.stdout)
    compiled = [row for row in found["rows"] if row["compiled"]]
    assert len(compiled) == 2
    best = found["rows"][0]
    assert (best["compiled"], best["fits"]) == (True, True)
    assert best["headroom_bytes"] > 0
    # Params as they are, replicated, do not fit; no way that was compiled claims they do.
    whole = [row for row in found["rows"] if row["fields"]["mesh.fsdp"] == 1]
    assert whole
    assert not any(row["fits"] for row in whole)
    assert done.stderr.count("muster: [") == 2

    # The words are those of a plan that fits, and the search has kept it.
    done = searcher.run(*best["overrides"], "--json")
    assert done.returncode == contract.EXIT_DONE
    assert done.stderr == ""
    assert json.loads(done.stdout)["peak_bytes"] == best["peak_bytes"]

    # The same again compiles nothing, and says the same as a table.
    done = searcher.run("--search", "--compile=2")
    assert done.returncode == contract.EXIT_DONE
    assert done.stderr.count("(planned before)") == 2
    head, first, *rest = done.stdout.splitlines()
    assert head.split()[:3] == ["way", "fits", "step"]
    assert "(compiled)" in first
    assert f"  1  {shlex.join(best['overrides'])}" in [f"  {line.strip()}" for line in rest]


def test_ctrl_c_leaves_nothing_running_and_shows_what_there_is(searcher):
    process = searcher.start("--search", "--compile=4", "--parallel=2")
    planners: list[int] = []

    def started() -> bool:
        planners[:] = children_of(process.pid, "trainer.plan\0")
        return len(planners) == 2

    wait_until(started, "two compilations at once")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == contract.EXIT_RESUMABLE, err
    assert "interrupted; the same command goes on where it was" in err
    assert "(estimated)" in out
    assert "(compiled)" not in out  # They were not waited for.
    assert "what gives each row" in out
    assert [pid for pid in planners if os.path.exists(f"/proc/{pid}")] == []


def test_a_killed_search_takes_its_compilations_along(searcher):
    process = searcher.start("--search", "--compile=1")
    planners: list[int] = []

    def started() -> bool:
        planners[:] = children_of(process.pid, "trainer.plan\0")
        return bool(planners)

    wait_until(started, "a compilation")
    process.kill()
    process.communicate(timeout=TIMEOUT_SECONDS)
    wait_until(lambda: not os.path.exists(f"/proc/{planners[0]}"), "the compilation to end")
    assert list(searcher.temporary.rglob("plan.json")) == []  # It was not left to finish.


def children_of(pid: int, module: str) -> list[int]:
    """The children of a process that run a module."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_text()
            except (OSError, ValueError):
                continue
            if parent == pid and f"\0-m\0{module}" in command and "\0-I\0" not in command:
                found.append(int(entry.name))
    return found
