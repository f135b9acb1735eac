"""Steps deleted by hand, but never the only good one."""

from __future__ import annotations

from collections.abc import Sequence

from launch.spec import ConfigError
from trainer.checkpoints.places import files_of
from trainer.checkpoints.steps import UNFINISHED, Step
from trainer.storage import Path


def delete(
    directory: Path, steps: Sequence[Step], chosen: Sequence[Step], *, live: str | None = None
) -> list[str]:
    """Delete steps: all that were chosen, or none.

    Args:
      directory: of the checkpoints.
      steps: all that are there.
      chosen: of these.
      live: `running` or `starting` while a run uses them; None otherwise.

    Returns:
      The names of what was deleted.

    Raises:
      ConfigError: it must not be.
    """
    check(steps, chosen, live)
    files = files_of(directory)
    for step in chosen:
        files.remove(directory / step.name)
    left = [step.name for step in chosen if (directory / step.name).exists()]
    if left:
        raise ConfigError("", f"{', '.join(left)} could not be deleted; the log says why")
    return [step.name for step in chosen]


def check(steps: Sequence[Step], chosen: Sequence[Step], live: str | None) -> None:
    """Whether these may be deleted. Pure.

    Raises:
      ConfigError: says why not.
    """
    names = {step.name for step in chosen}
    if live == "starting":
        rule = "the run is starting and may be reading them; wait until it is at a step"
        raise ConfigError("", f"{', '.join(sorted(names))}: {rule}; nothing was deleted")
    saving = [step.name for step in chosen if step.state == UNFINISHED]
    if live and saving:
        raise ConfigError("", f"{saving[0]} is being saved by the run; nothing was deleted")
    good = [step for step in steps if step.good]
    if good and all(step.name in names for step in good):
        only = (
            f"step {good[0].step} is the only good one"
            if len(good) == 1
            else (f"steps {', '.join(str(step.step) for step in good)} are all the good ones")
        )
        raise ConfigError("", f"{only} of this run, and one must stay; nothing was deleted")
