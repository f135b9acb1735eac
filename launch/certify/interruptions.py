"""Which interruptions a run goes through, and where. Pure: a seed decides what is left open."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from launch.spec import ConfigError, closest

PHASES = ("restore", "compile", "step", "save", "eval")
# Of a name PHASE:KIND. `twice` is two kills of the gang at the same step, one after the other.
KINDS = ("kill", "kill_one", "exception", "sigterm", "twice")
ALL = (
    "step:kill",
    "restore:kill_one",
    "compile:kill",
    "save:kill",
    "eval:kill_one",
    "save:kill_one",
    "step:exception",
    "restore:kill",
    "eval:kill",
    "step:sigterm",
    "step:twice",
)
_FEW = 4  # Interruptions that find their places in fewer steps.
_LONGEST_DELAY_SECONDS = 0.1

_KINDS_IN_WORDS = {"exception": "an exception", "sigterm": "SIGTERM", "kill": "SIGKILL"}
_PHASES_IN_WORDS = {
    "restore": "during the restore",
    "compile": "during compilation",
    "step": "after a step",
    "save": "in the middle of a save",
    "eval": "in the middle of an evaluation",
}


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long the certified runs are.

    Attributes:
      steps: updates in all.
      save_every: between checkpoints.
      eval_every: between evaluations; 0 where the config has none.
    """

    steps: int
    save_every: int
    eval_every: int


@dataclasses.dataclass(frozen=True)
class Interruption:
    """One fault that a trial is to suffer.

    Attributes:
      name: PHASE:KIND, as it was asked for.
      others: see `trainer.certify.faults.Fault`.
    """

    name: str
    id: int
    kind: str
    phase: str
    step: int | None
    process: int | None
    delay_seconds: float

    @property
    def text(self) -> str:
        """`SIGKILL of process 1, in the middle of a save`."""
        if self.process is None:
            whom = " of all processes"
        else:
            whom = f" {'in' if self.kind == 'exception' else 'of'} process {self.process}"
        if self.kind == "sigterm":
            whom = f" to process {self.process}"
        return f"{_KINDS_IN_WORDS[self.kind]}{whom}, {_PHASES_IN_WORDS[self.phase]}"


def pace(steps: int, evaluates: bool, count: int = 0) -> Pace:
    """Saves four times, and evaluates between saves.

    Args:
      steps: of each run.
      evaluates: whether the config does.
      count: of interruptions that have to find a place.

    Raises:
      ConfigError: too few steps for that.
    """
    least = 12 if count > _FEW else 8
    if steps < least:
        rule = f"must be at least {least}, for saves and {count} interruptions between them"
        raise ConfigError("--steps", rule, steps)
    save_every = -(-steps // 4)
    return Pace(steps, save_every, save_every + 1 if evaluates else 0)


def parse(text: str | None) -> list[str]:
    """The names of `--interruptions=NAME,...`; all of them by default, none for `none`.

    Raises:
      ConfigError: a name is unknown.
    """
    if text is None:
        return list(ALL)
    if text == "none":
        return []
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        phase, _, kind = name.partition(":")
        if phase not in PHASES or kind not in KINDS:
            known = [*ALL, *(f"{phase}:{kind}" for phase in PHASES for kind in KINDS)]
            rule = f"there is no {name!r}; {closest(name, known, most=len(ALL))}"
            raise ConfigError("--interruptions", rule, text)
    if not names:
        raise ConfigError("--interruptions", f"names none; known: {', '.join(ALL)}", text)
    return names


def schedule(
    names: Sequence[str], pace: Pace, num_processes: int, seed: int, first_id: int = 1
) -> list[Interruption]:
    """Spread interruptions over the steps of one run, in the order of their names.

    Each is to happen at its step or later: where a run goes on from is known only when it does.

    Args:
      names: PHASE:KIND.
      pace: of the run.
      num_processes: of the gang, one of which is chosen where one alone is interrupted.
      seed: of the choices.
      first_id: of the interruptions' numbers.
    """
    chance = random.Random(seed)
    wanted = list(names)
    # A restore needs something to restore.
    if wanted and wanted[0].startswith(("restore:", "compile:")):
        wanted.insert(0, "step:kill")
    found: list[Interruption] = []
    saved = 0  # The step that the run goes on from.
    for number, name in enumerate(wanted):
        phase, _, kind = name.partition(":")
        share = (number + chance.random()) / len(wanted)
        step = _step_of(phase, saved, pace, share, left=3 if kind == "sigterm" else 0)
        for _ in range(2 if kind == "twice" else 1):
            alone = kind in ("kill_one", "exception", "sigterm")
            found.append(
                Interruption(
                    name=name,
                    id=first_id + len(found),
                    kind="kill" if kind in ("kill_one", "twice") else kind,
                    phase=phase,
                    step=step,
                    process=chance.randrange(num_processes) if alone else None,
                    delay_seconds=round(chance.uniform(0, _LONGEST_DELAY_SECONDS), 3),
                )
            )
        saved = max(saved, _saved_after(kind, step, pace))
    return found


def _step_of(phase: str, saved: int, pace: Pace, share: float, left: int) -> int | None:
    """Where an interruption is to happen.

    Args:
      phase: of it.
      saved: the step that the run goes on from.
      pace: of the run.
      share: of the run's interruptions that come before, from 0 to 1.
      left: steps that have to be left if that is possible.
    """
    if phase in ("restore", "compile"):
        return None
    # Behind the first checkpoint, and behind where the run goes on from.
    first = max(pace.save_every, saved) + 1
    at = max(first, pace.save_every + 1 + int(share * (pace.steps - pace.save_every - 1)))
    at = max(first, min(at, pace.steps - left))
    if phase == "save":
        # Rather not the last one: the run waits for that, where others go on beside the training.
        return (
            max(min(-(-at // pace.save_every), 3), -(-first // pace.save_every)) * pace.save_every
        )
    if phase == "eval":
        # The soonest: the last one comes behind the last save, and leaves nothing to interrupt.
        return min(-(-first // pace.eval_every) * pace.eval_every, pace.steps)
    return at


def _saved_after(kind: str, step: int | None, pace: Pace) -> int:
    """The newest step that is surely saved when an interruption has happened at `step`."""
    if step is None:
        return 0
    if kind == "sigterm":  # All processes agree on a step to save, which is not known yet.
        return min(step + 1, pace.steps - 1)
    return (step - 1) // pace.save_every * pace.save_every


def applicable(names: Sequence[str], pace: Pace) -> tuple[list[str], list[str]]:
    """Those that this run can suffer, and those that it cannot: without evaluations there is no
    middle of one."""
    able = [name for name in names if pace.eval_every or not name.startswith("eval:")]
    return able, [name for name in names if name not in able]


def shared_out(names: Sequence[str], trials: int) -> list[list[str]]:
    """Interruptions spread over so many trials, neighbours together."""
    size = -(-len(names) // max(1, trials))
    return [list(names[i : i + size]) for i in range(0, len(names), size)] if size else []


def plan_of(
    directory: str, pace: Pace, interruptions: Sequence[Interruption], keep_all: bool
) -> Mapping[str, Any]:
    """The plan file of a run, which the trainer reads."""
    return {
        "schema": 1,
        "directory": directory,
        "spec": {
            "num_steps": pace.steps,
            "save_every_steps": pace.save_every,
            "eval_every_steps": pace.eval_every,
            "keep_all": keep_all,
        },
        "faults": [
            {k: v for k, v in dataclasses.asdict(interruption).items() if k != "name"}
            for interruption in interruptions
        ],
    }
