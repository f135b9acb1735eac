"""What can happen to a gang, and what can be done about it: the words between
`launch.controller` and `launch.supervise`.

Times are seconds of the controller's steady clock; what a host's agent reports by its own clock has
been converted, so that hosts whose clocks differ can be compared.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Failure:
    """An exception that ends a process, as the process itself recorded it.

    Attributes:
      type: its class, e.g. `ValueError` or `jaxlib._jax.XlaRuntimeError`, as tracebacks show it.
      message: `str` of it.
      traceback: as Python prints it; may be cut in the middle.
      at: when it was recorded.
      accuses: the processes that it says are the reason (those that did not come to a roll call,
        say); empty when it speaks for itself.
    """

    type: str
    message: str
    traceback: str
    at: float
    accuses: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Started:
    """A process was started."""

    process_id: int


@dataclasses.dataclass(frozen=True)
class Exited:
    """A process ended: `exit_code` or `signal` is set.

    Attributes:
      process_id: which.
      exit_code: of its own; None if a signal ended it.
      signal: that ended it; None if it ended by itself.
      ended_at: when.
      told_at: when its agent had sent it a signal of ours, None if never: what follows that is no
        failure of its own.
      failure: the exception that it recorded.
      oom_killed: the kernel ended it for want of memory.
      last_lines: of its log.
    """

    process_id: int
    exit_code: int | None
    signal: int | None
    ended_at: float
    told_at: float | None = None
    failure: Failure | None = None
    oom_killed: bool = False
    last_lines: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class NotStarted:
    """A process could not be started at all."""

    process_id: int
    message: str
    ended_at: float


@dataclasses.dataclass(frozen=True)
class Raised:
    """A process has recorded the exception that ends it; to be gone may take it long."""

    process_id: int
    failure: Failure


@dataclasses.dataclass(frozen=True)
class Progress:
    """A process's newest report.

    Attributes:
      process_id: which.
      step: completed updates.
      phase: one of `contract.PHASES`, or a word of the program's own.
      since: when its step or phase changed last.
    """

    process_id: int
    step: int
    phase: str
    since: float


@dataclasses.dataclass(frozen=True)
class Stacks:
    """What a process is doing, taken without its help.

    Attributes:
      process_id: which.
      text: the Python stacks of all threads as faulthandler writes them (newest frame first, the
        main thread last, the one that took the signal marked `Current thread`); "" if none.
      state: the letter of its state in /proc (R, S, D, T, Z); "" when unknown.
    """

    process_id: int
    text: str
    state: str = ""


@dataclasses.dataclass(frozen=True)
class HostLost:
    """A host's agent is gone, or not heard of for longer than its lease, without having said that
    it is done; `at` is when it was last heard of."""

    host: str
    at: float


@dataclasses.dataclass(frozen=True)
class GangGone:
    """Every agent of the attempt has ended: nothing of it is alive, and no more will be heard."""


@dataclasses.dataclass(frozen=True)
class StopRequested:
    """The user wants the run to end: once gracefully, twice at once."""


@dataclasses.dataclass(frozen=True)
class Interrupted:
    """Whoever lends the machines wants them back, or will soon: the gang is to save and leave.

    Attributes:
      cause: `preempted`, `time_limit`, `host_lost` or `stopped`.
      message: who wants it and why, for the user.
      seconds: how long the gang may take.
      host: that was lost.
    """

    cause: str
    message: str
    seconds: float
    host: str | None = None


@dataclasses.dataclass(frozen=True)
class HostLeaving:
    """A host takes no new work (it is drained, say): no further attempt may start on it."""

    host: str


@dataclasses.dataclass(frozen=True)
class Tick:
    """Nothing happened but time passing."""


Event = (
    Started
    | Exited
    | NotStarted
    | Raised
    | Progress
    | Stacks
    | HostLost
    | GangGone
    | StopRequested
    | Interrupted
    | HostLeaving
    | Tick
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Start an attempt on these hosts; process ids run over them in this order, from 0."""

    hosts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TakeStacks:
    """Ask every agent for its processes' stacks."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """Send SIGTERM to every process group; `reason` is for the user.

    Attributes:
      seconds: how long until what is left is killed.
    """

    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Kill:
    """Send SIGKILL to every process group; `reason` is for the user."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why an attempt ended.

    Attributes:
      cause: one of `contract.CAUSES`.
      exit_code: of `muster run`, if this is the last attempt.
      message: one line: who, and how; "" for a completed attempt.
      guilty_process: the process that ended the gang; None when nobody did.
      guilty_host: its host, or the host that was lost.
      explanation: the message and what speaks for it, in one paragraph for a tired person.
      failure: the guilty process's exception.
      last_lines: of the guilty process's log.
      collateral: processes that failed only because of the guilty one, in order of their ids.
    """

    cause: str
    exit_code: int
    message: str = ""
    guilty_process: int | None = None
    guilty_host: str | None = None
    explanation: str = ""
    failure: Failure | None = None
    last_lines: tuple[str, ...] = ()
    collateral: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Retry:
    """What follows an attempt.

    Attributes:
      again: whether another attempt does.
      why: in words, either way; "" when nothing needs to be said (completed, stopped).
      delay_seconds: until then.
    """

    again: bool
    why: str = ""
    delay_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Close:
    """The attempt is over: record its verdict, and what follows it."""

    verdict: Verdict
    retry: Retry


@dataclasses.dataclass(frozen=True)
class Requeue:
    """Give the machines back and ask for others; Finish follows.

    Attributes:
      without: hosts that are not to be among them.
      delay_seconds: how long to wait before.
    """

    without: tuple[str, ...]
    delay_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Finish:
    """The run is over, or goes on elsewhere."""

    exit_code: int


Action = Start | TakeStacks | Stop | Kill | Close | Requeue | Finish
