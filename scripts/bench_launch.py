"""How long from the command to the first line, and to the first training step.

    python scripts/bench_launch.py                 # first line of a trivial program, 2 processes
    python scripts/bench_launch.py --first_step    # also the quickstart's first step, warm cache

Rounds are paired: each runs every contender once, in turn, so that a busy machine is busy for all.
Prints medians, and ratios as the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRIVIAL = [sys.executable, "-c", "print('first line', flush=True)"]
# Starts two processes and shows the first one's output: the least that any launcher must do.
SPAWNER = (
    "import subprocess, sys;"
    "gang = [subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE) for _ in range(2)];"
    "print(gang[0].stdout.readline().decode(), end='', flush=True);"
    "[process.communicate() for process in gang]"
)
TORCHRUN_SECONDS = 1.3  # Two trivial processes on an idle machine of two cores.


def seconds_to_line(command: list[str], is_it: Callable[[str], bool]) -> float:
    """Seconds from starting a command to the first line on its output that `is_it` accepts."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    for line in process.stdout:
        if is_it(line):
            seconds = time.perf_counter() - start
            break
    else:
        raise SystemExit(f"{command} ended without the line: {process.communicate()[1]}")
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=1)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # Once more: at once.
        process.communicate(timeout=30)
    return seconds


def spawner(_: Path) -> float:
    """The baseline."""
    return seconds_to_line([sys.executable, "-c", SPAWNER, *TRIVIAL], lambda line: True)


def muster(workdir: Path) -> float:
    """`muster run` of the same program."""
    command = [sys.executable, "-m", "launch", "run", "--cluster=configs/cluster/local.py"]
    command += [f"--workdir={workdir}", "--", *TRIVIAL]
    return seconds_to_line(command, lambda line: "first line" in line)


def first_step(workdir: Path) -> float:
    """`muster run` of the quickstart, from the command to its first line about a step."""
    command = [sys.executable, "-m", "launch", "run", "--cluster=configs/cluster/local.py"]
    command += [f"--workdir={workdir}", "--config=configs/lm_bytes.py"]
    command += ["--config.log_every_steps=1"]
    return seconds_to_line(command, lambda line: line.startswith("step "))


def main() -> None:
    """Run the rounds and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--first_step", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdirs = (Path(folder) / str(number) for number in range(10**6))
        spawner(next(workdirs)), muster(next(workdirs))  # Files into the page cache.
        rounds = [
            (spawner(next(workdirs)), muster(next(workdirs))) for _ in range(arguments.rounds)
        ]
        base, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(mine / least for least, mine in rounds)
        print(f"first line, bare spawner: {base:.3f} s")
        print(
            f"first line, muster run:   {ours:.3f} s (goal 0.25 s), {ratio:.1f} times the spawner"
        )
        print(f"  torchrun on an idle machine: {TORCHRUN_SECONDS} s")
        if arguments.first_step:
            first_step(next(workdirs))  # Fills the compile cache.
            steps = [first_step(next(workdirs)) for _ in range(max(3, arguments.rounds // 3))]
            print(
                f"first training step, warm compile cache: "
                f"{statistics.median(steps):.2f} s (goal 4 s)"
            )


if __name__ == "__main__":
    main()
