"""What progress costs: of a training's step, and of the agent that reads it.

    python scripts/bench_progress.py

Prints the time of one `report_progress`, as the training loop calls it (two a step), beside the
time of a write-and-rename of the same record; and the share of a core that an agent takes which
watches 8 processes that report 100 steps a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import contract  # noqa: E402 (the path first)
from launch.backends import host_plan  # noqa: E402

STEPS = 5000
PAIRS = 5
PROCESSES = 8
SECONDS = 8.0
REPORTER = """
import time
from launch.contract import report_progress
for step in range(10**9):
    report_progress(step, "data")
    report_progress(step, "step")
    time.sleep(0.01)
"""


def per_call_seconds(report) -> float:
    began = time.perf_counter()
    for step in range(STEPS):
        report(step, "data")
        report(step, "step")
    return (time.perf_counter() - began) / STEPS / 2


def in_place(step: int, phase: str) -> None:
    contract.report_progress(step, phase)


def by_rename(step: int, phase: str) -> None:
    record = {"schema": 1, "step": step, "phase": phase, "time": time.time()}
    contract.write_atomically(os.environ[contract.PROGRESS_FILE] + ".other", json.dumps(record))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def agent_share(folder: Path) -> float:
    """The share of a core that an agent takes."""
    (folder / contract.STACKS).mkdir()
    processes = []
    for process_id in range(PROCESSES):
        files = host_plan.files_of(folder, process_id)
        env = {"PYTHONPATH": str(ROOT), contract.PROGRESS_FILE: files["progress"]}
        argv = [sys.executable, "-c", REPORTER]
        processes.append({"process_id": process_id, "argv": argv, "env": env, **files})
    plan = {"schema": 1, "host": "here", "lease_seconds": 60.0, "max_grace_seconds": 1.0}
    plan |= {"max_log_bytes": 1 << 26, "hook": None, "processes": processes}
    agent = subprocess.Popen(host_plan.AGENT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert agent.stdin is not None
    agent.stdin.write(json.dumps(plan).encode() + b"\n")
    agent.stdin.flush()
    time.sleep(1.5)
    before = cpu_seconds(agent.pid)
    time.sleep(SECONDS)
    share = (cpu_seconds(agent.pid) - before) / SECONDS
    agent.stdin.close()
    agent.wait()
    return share


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ[contract.PROGRESS_FILE] = f"{folder}/progress.json"
        print("microseconds of one report: in place, by rename, ratio")
        for _ in range(PAIRS):
            here, there = per_call_seconds(in_place), per_call_seconds(by_rename)
            print(f"  {here * 1e6:5.1f}  {there * 1e6:6.1f}  {here / there:.3f}")
        attempt = Path(folder, "attempt")
        attempt.mkdir()
        share = agent_share(attempt)
        print(f"an agent that watches {PROCESSES} processes takes {share:.1%} of a core")


if __name__ == "__main__":
    main()
