"""How a gang is watched and when it is started again: two sections of a cluster config."""

from __future__ import annotations

import dataclasses

from launch.spec.fields import require


@dataclasses.dataclass(frozen=True)
class RestartPolicy:
    """When a failed attempt is followed by another. Counted per `muster run`.

    Never after cause `config`, never once more after the same exception at the same step.

    Attributes:
      max_failures: further attempts after failures: `exception`, `oom`, `killed`, `hang`,
        `start_timeout`.
      max_preemptions: further attempts after `preempted`, `time_limit` and `host_lost`.
      backoff_seconds: wait before the first further attempt; it doubles each time, and up to half
        of it is taken off at random, so that many runs do not come back at once.
      max_backoff_seconds: the longest wait.
      max_attempts_without_progress: give up after so many attempts in a row that got no further
        than an earlier one; 0 never does.
    """

    max_failures: int = 0
    max_preemptions: int = 0
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 300.0
    max_attempts_without_progress: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value >= 0, field.name, value, "must be 0 or more")
        require(
            self.backoff_seconds <= self.max_backoff_seconds,
            "backoff_seconds",
            self.backoff_seconds,
            f"must not be above max_backoff_seconds={self.max_backoff_seconds:g}",
        )


@dataclasses.dataclass(frozen=True)
class WatchPolicy:
    """For how long a process may show no progress, in seconds, by what it says it is doing.

    Processes that never report are watched for their life only. Every limit is above 0.

    Attributes:
      start_seconds: until its first report, once another process of the gang has reported.
      init_seconds: joining the gang and building the model.
      restore_seconds: reading a checkpoint.
      compile_seconds: compiling, and the first steps, whose usual time is not known yet.
      data_seconds: waiting for the next batch.
      step_min_seconds: a step, at the least; more where steps are slow:
      step_medians: so many times the running median of the step time.
      save_seconds: the part of a save that holds up the steps.
      eval_seconds: an evaluation, or what is shown at the end.
      exit_seconds: leaving.
    """

    start_seconds: float = 300.0
    init_seconds: float = 600.0
    restore_seconds: float = 1800.0
    compile_seconds: float = 3600.0
    data_seconds: float = 300.0
    step_min_seconds: float = 60.0
    step_medians: float = 20.0
    save_seconds: float = 1800.0
    eval_seconds: float = 1800.0
    exit_seconds: float = 300.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value > 0, field.name, value, "must be above 0")
