"""Faults by the hundred against one small run, which must end as if nothing had happened.

    python -m scripts.chaos                              # 500 faults, 23 minutes on two cores
    python -m scripts.chaos --faults=50 --seed=7         # the same 50 every time

Processes, agents and the launcher are killed, asked to stop, stopped; the disk is full, the
checkpoint directory read-only, data slow, the clock wrong. The run is started again when all of it
has ended. In the end every leaf of its state and the metrics of every step are compared, bit for
bit, with those of the same run without faults; exit code 1 if anything is not as it must be.

Faults of the disk need mounts: as root, or where a user may have a mount namespace.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.testing.chaos import driver, schedule, storage  # noqa: E402

_INSIDE = "CHAOS_INSIDE"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where everything is kept; else it is deleted")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    flags = parser.parse_args()
    if not os.environ.get(_INSIDE):
        # Mounts of its own; the process stays the same one, and so does who may end it.
        os.environ[_INSIDE] = "1"
        os.environ["JAX_PLATFORMS"] = "cpu"
        words = storage.private([sys.executable, __file__, *sys.argv[1:]])
        os.execvp(words[0], words)
    with tempfile.TemporaryDirectory(prefix="muster-chaos-") as temporary:
        folder = flags.folder or Path(temporary)
        trial = driver.run_trial(folder, flags.seed, flags.faults, _tell)
    print(as_text(trial))
    if flags.json:
        flags.json.write_text(json.dumps(dataclasses.asdict(trial), indent=1) + "\n")
    if trial.wrong:
        print(f"play it again: python -m scripts.chaos --faults={flags.faults} --seed={flags.seed}")
    return 1 if trial.wrong else 0


def as_text(trial: driver.Trial) -> str:
    """The figures, for people."""
    planned = collections.Counter(fault.kind for fault in trial.faults)
    came = collections.Counter(done.fault.kind for done in trial.deliveries)
    felt = collections.Counter(done.fault.kind for done in trial.deliveries if done.felt)
    lines = [f"{'fault':22} planned  delivered  felt"]
    lines += [
        f"{kind:22} {planned[kind]:7} {came[kind]:10} {felt[kind]:5}" for kind in schedule.SHARES
    ]
    lines.append(f"{'all':22} {planned.total():7} {came.total():10} {felt.total():5}")
    causes = collections.Counter(trial.causes)
    ended = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    lines.append(f"attempts: {len(trial.causes)} ({ended})")
    lines.append(
        f"muster run: started {trial.starts} times, {trial.gave_up} times because it gave up"
    )
    lines.append(
        f"steps: {trial.steps}, {trial.steps_lost} done again; {trial.seconds:.0f} s, without "
        f"faults {trial.reference_seconds:.0f} s; {trial.cpu_seconds:.0f} s of CPU for both"
    )
    shares = trial.goodput.get("shares") or {}
    parts = ", ".join(f"{part} {share:.1%}" for part, share in shares.items() if share > 0.0005)
    share, recorded = (trial.goodput.get(name) or 0.0 for name in ("goodput", "wall_seconds"))
    lines.append(f"goodput: {share:.1%} of {recorded:.0f} s on record ({parts})")
    lines += [f"wrong: {problem}" for problem in trial.wrong]
    same = "bit for bit the run without faults"
    lines.append(f"verdict: {'FAILED' if trial.wrong else same}")
    return "\n".join(lines)


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
