"""Which fault when: a seed makes a schedule, and the same one every time. Pure."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

# Kind of a fault -> its share of 50.
SHARES = {
    "kill process": 5,
    "kill agent": 2,
    "kill launcher": 2,
    "ask process to stop": 2,
    "ask agent to stop": 1,
    "ask launcher to stop": 1,
    "freeze process": 1,  # For ever: the launcher has to find it.
    "pause process": 10,
    "pause agent": 5,
    "pause launcher": 4,
    "disk full": 2,
    "read-only": 2,
    "slow data": 7,
    "clock jump": 6,
}
NEEDS_MOUNTS = ("disk full", "read-only")
# After these there is another attempt for sure, or another `muster run`.
RESTARTS = (
    *("kill process", "kill agent", "kill launcher", "ask agent to stop", "ask launcher to stop"),
)
# These may meet a gang that has not begun to train.
_ANY_PHASE = (*RESTARTS, "ask process to stop", "pause process", "pause agent", "pause launcher")
_WHILE_SAVING = ("kill", "ask", "pause")
START_PHASES = ("init", "restore", "compile")
NUM_PROCESSES = 2
STEPS_BETWEEN = 4  # From one fault to the next, on average, as far as the run gets.
STEPS_AFTER = 60  # Behind the last fault.
_LONGEST_JUMP_SECONDS = 36_000


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
      number: from 0, in the order of the schedule.
      kind: of SHARES.
      step: not before the run has been here.
      when: "step" as soon as it is there; "saving" while a save is being written; or one of
        START_PHASES of the attempt that follows the fault before.
      process: whom it befalls, or whose agent; of slow data, who reads slowly.
      seconds: how long it lasts, or lasts on after it was felt.
      jump_seconds: of the clock.
    """

    number: int
    kind: str
    step: int
    when: str
    process: int
    seconds: float = 0.0
    jump_seconds: float = 0.0

    def __str__(self) -> str:
        text = f"#{self.number} step {self.step}, {self.when}: {self.kind}"
        if self.kind not in ("kill launcher", "ask launcher to stop", "pause launcher"):
            text += f" {self.process}"
        if self.jump_seconds:
            text += f" by {self.jump_seconds:+.0f} s"
        return text + (f" for {self.seconds:.2f} s" if self.seconds else "")


def make_schedule(seed: int, num_faults: int, mounts: bool = True) -> list[Fault]:
    """The faults in the order in which they happen.

    Args:
      seed: chooses everything.
      num_faults: how many. The shares of kinds are kept, whatever the seed.
      mounts: whether there may be faults that need a file system of the run's own.
    """
    rng = random.Random(f"{seed}/{num_faults}/{mounts}")
    kinds = _deck(num_faults, [kind for kind in SHARES if mounts or kind not in NEEDS_MOUNTS])
    rng.shuffle(kinds)
    faults: list[Fault] = []
    for number, kind in enumerate(kinds):
        before = faults[-1].kind if faults else ""
        faults.append(
            Fault(
                number,
                kind,
                step=STEPS_BETWEEN * (number + 1) + rng.randrange(-1, 2),
                when=_when(rng, kind, before),
                process=rng.randrange(NUM_PROCESSES),
                seconds=_seconds(rng, kind),
                jump_seconds=_jump(rng) if kind == "clock jump" else 0.0,
            )
        )
    return faults


def num_steps(num_faults: int) -> int:
    """How long a run must be for so many faults."""
    return STEPS_BETWEEN * (num_faults + 1) + STEPS_AFTER


def _deck(size: int, kinds: Sequence[str]) -> list[str]:
    """So many kinds, each by its share; what is left goes to the largest remainders."""
    total = sum(SHARES[kind] for kind in kinds)
    exact = {kind: size * SHARES[kind] / total for kind in kinds}
    counts = {kind: int(exact[kind]) for kind in kinds}
    by_remainder = sorted(kinds, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_remainder[: size - sum(counts.values())]:
        counts[kind] += 1
    return [kind for kind in kinds for _ in range(counts[kind])]


def _when(rng: random.Random, kind: str, before: str) -> str:
    chance = rng.random()
    if before in RESTARTS and kind in _ANY_PHASE and chance < 0.5:
        return rng.choice(START_PHASES)
    if kind.startswith(_WHILE_SAVING) and chance > 0.6:
        return "saving"
    return "step"


def _seconds(rng: random.Random, kind: str) -> float:
    if kind.startswith("pause"):
        return rng.uniform(0.05, 1.5)
    if kind in NEEDS_MOUNTS:
        return rng.choice((0.0, 0.0, 1.5))
    if kind == "slow data":
        return rng.uniform(0.3, 1.0)
    return rng.uniform(0.5, 6.0) if kind == "clock jump" else 0.0


def _jump(rng: random.Random) -> float:
    seconds = rng.choice((2.0, 90.0, 3600.0, _LONGEST_JUMP_SECONDS)) * rng.uniform(0.5, 1.0)
    return seconds * rng.choice((-1, 1))
