"""Does a process that prints much slow the steps of its neighbour?

    python scripts/bench_log_volume.py

Runs, in pairs, gangs of two processes: one times steps of plain computation, the other prints
100 MB in two seconds or is silent. Prints the median step beside the one to that beside the other.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 5
PROGRAM = """
    import os, statistics, sys, time
    import numpy as np
    if os.environ["MUSTER_PROCESS_ID"] == "1":
        line = "x" * 99 + chr(10)
        began = time.monotonic()
        for _ in range(100):
            if os.environ["CHATTY"] == "1":
                sys.stdout.write(line * 10_000)  # A megabyte
            time.sleep(0.02)
    else:
        a, times = np.ones((300, 300)), []
        while sum(times) < 2.0:
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        print("step", statistics.median(times), flush=True)
"""


def step_seconds(chatty: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        cluster = Path(folder, "cluster.py")
        cluster.write_text(
            "def get_config():\n    return {'backend': 'local', 'processes_per_host': 2}\n"
        )
        program = Path(folder, "program.py")
        program.write_text(textwrap.dedent(PROGRAM))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "launch", "run", f"--cluster={cluster}"),
                *(f"--workdir={folder}/run", "--", sys.executable, str(program)),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "CHATTY": str(int(chatty))}
            | {"MUSTER_STATE_DIR": folder, "OPENBLAS_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
    return float(done.stdout.split()[1])


def main() -> None:
    ratios = []
    for _ in range(PAIRS):
        silent, chatty = step_seconds(chatty=False), step_seconds(chatty=True)
        ratios.append(chatty / silent)
        print(
            f"step {silent * 1e3:.3f} ms beside a silent process, {chatty * 1e3:.3f} ms: ", end=""
        )
        print(f"{ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
