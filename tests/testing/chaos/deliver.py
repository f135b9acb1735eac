"""Does one fault to a run, and sees that it has happened."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable

from launch import contract
from tests.testing.chaos import config, task
from tests.testing.chaos.schedule import NUM_PROCESSES, START_PHASES, Fault
from tests.testing.chaos.world import Victim, World, variable_of

_FELT_SECONDS = 10.0  # For so long a disk is full if nobody minds.
_AHEAD = 12  # Batches that may be read beyond a fault's step.
_STEP_SECONDS = 0.25  # Between two more, for what is felt only by a run that goes on.
_SIGNALS = {"kill": signal.SIGKILL, "ask": signal.SIGTERM}


@dataclasses.dataclass
class Delivery:
    """A fault that has happened.

    Attributes:
      fault: which.
      attempts: numbers of the first and the last attempt that it can have met.
      step, phase: what the one it befell had reported.
      felt: whether it is certain that somebody has met it.
    """

    fault: Fault
    attempts: tuple[int, int]
    step: int
    phase: str
    felt: bool = True


class Deliverer:
    """Delivers a schedule's faults, in order."""

    def __init__(self, world: World):
        self._world = world
        self._gate = 0
        self._disk_busy = False
        self._jumps = 0
        self._attempt_before = -1  # Of the fault before.

    def deliver(self, fault: Fault) -> Delivery:
        """Wait for a fault's moment, and let it happen.

        Raises:
          ChaosError: its moment does not come, or it does not happen.
        """
        world = self._world
        self._open_gate(fault.step + _AHEAD)
        world.wait(lambda: self._due(fault), f"moment for {fault}")
        kind, _, rest = fault.kind.partition(" ")
        if kind in _SIGNALS:
            done = self._end(fault, rest.split()[0], _SIGNALS[kind])
        elif kind in ("pause", "freeze"):
            done = self._stop(fault, rest)
        elif fault.kind == "disk full":
            done = self._disturb_disk(fault, world.disk.fill, world.disk.empty)
        elif fault.kind == "read-only":
            done = self._disturb_disk(
                fault,
                lambda: world.disk.make_read_only(world.checkpoints),
                world.disk.make_writable,
            )
        elif fault.kind == "slow data":
            done = self._slow_down(fault)
        else:
            done = self._jump(fault)
        self._attempt_before = done.attempts[0]
        return done

    def _open_gate(self, step: int) -> None:
        if step > self._gate:
            self._gate = step
            self._world.open_gate(step)

    def _open_gate_to_next_save(self) -> None:
        """A run that is beyond the step of a fault must still come to a save; and not much further,
        or it would be done before its last fault."""
        step = max(self._world.progress(process)[0] for process in range(NUM_PROCESSES))
        every = config.SAVE_EVERY_STEPS
        self._open_gate((step // every + 1) * every + 1)

    def _wait_with_steps(self, condition: Callable[[], object], what: str) -> None:
        """Wait for what needs further steps of the run, and let it do some."""
        next_at = self._world.now() + _STEP_SECONDS

        def check() -> object:
            nonlocal next_at
            if self._world.now() > next_at:
                next_at += _STEP_SECONDS
                self._open_gate(self._gate + 1)
            return condition()

        self._world.wait(check, what)

    def _due(self, fault: Fault) -> bool:
        step, phase = self._world.progress(fault.process)
        if fault.when in START_PHASES:
            new = self._world.attempt > self._attempt_before
            # Behind it is better than never: phases can be too short to be seen.
            late = phase in contract.PHASES[contract.PHASES.index(fault.when) :]
            return new and bool(phase) and late
        step = max(step, self._world.progress(1 - fault.process)[0])
        if step < fault.step:
            return False
        if fault.when == "saving":
            self._open_gate_to_next_save()
        if fault.when == "saving" and not self._world.saving():
            return False
        # What is there of a gang that is gone was reported before, and nothing can befall it.
        return all(self._world.pid_of("process", process) for process in range(NUM_PROCESSES))

    # ------------------------------------------------------------------ signals

    def _victim(self, fault: Fault, who: str) -> tuple[Victim, Delivery]:
        """Whom it is to befall, waited for."""
        world = self._world
        pid = world.wait(lambda: world.pid_of(who, fault.process), f"{who} for {fault}")
        try:
            victim = Victim(pid)
        except ProcessLookupError:
            return self._victim(fault, who)
        attempt = world.attempt
        if who == "process":
            attempt = int(variable_of(pid, contract.ATTEMPT) or attempt)
        return victim, Delivery(fault, (attempt, attempt), *world.progress(fault.process))

    def _gang(self) -> list[Victim]:
        """All processes that there are now."""
        found = []
        for process in range(NUM_PROCESSES):
            pid = self._world.pid_of("process", process)
            with contextlib.suppress(ProcessLookupError):
                found += [Victim(pid)] if pid else []
        return found

    def _end(self, fault: Fault, who: str, number: signal.Signals) -> Delivery:
        while True:
            victim, done = self._victim(fault, who)
            if victim.send(number):
                break
            victim.close()
        what = f"end of {victim.pid} after {fault}"
        if number == signal.SIGTERM:
            self._wait_with_steps(lambda: victim.ended, what)
        else:
            self._world.wait(lambda: victim.ended, what)
        victim.close()
        return done

    def _stop(self, fault: Fault, who: str) -> Delivery:
        """SIGSTOP; SIGCONT follows unless it is to be found frozen."""
        world = self._world
        while True:
            victim, done = self._victim(fault, who)
            if victim.send(signal.SIGSTOP):
                state = world.wait(lambda v=victim: v.state in "TZX" and (v.state or "X"), "stop")
                if state == "T":
                    break
            victim.close()
        if fault.kind.startswith("pause"):

            def go_on() -> None:
                victim.send(signal.SIGCONT)
                victim.close()

            world.later(fault.seconds, go_on)
        else:
            world.wait(lambda: victim.ended, f"end of {victim.pid} after {fault}")
            victim.close()
        return done

    # ------------------------------------------------------------------ the rest

    def _disturb_disk(
        self, fault: Fault, disturb: Callable[[], None], mend: Callable[[], None]
    ) -> Delivery:
        """One at a time; it lasts until somebody minds, and a little longer."""
        world = self._world
        world.wait(lambda: not self._disk_busy, "end of the fault of the disk before")
        attempt, ended = world.attempt, len(world.ended)
        gang = self._gang()
        done = Delivery(fault, (attempt, attempt), *world.progress(fault.process), felt=False)
        disturb()
        self._disk_busy = True
        limit = world.now() + _FELT_SECONDS

        def felt() -> bool:
            self._open_gate_to_next_save()
            died = any(victim.ended for victim in gang)
            done.felt = died or world.attempt != attempt or len(world.ended) > ended
            return done.felt or world.now() > limit

        world.wait(felt, "effect of a disturbed disk")
        for victim in gang:
            victim.close()

        def end() -> None:
            mend()
            self._disk_busy = False
            done.attempts = (attempt, world.attempt + 1)

        done.attempts = (attempt, 1 << 30)
        world.later(fault.seconds if done.felt else 0.0, end)
        return done

    def _slow_down(self, fault: Fault) -> Delivery:
        world = self._world
        done = Delivery(fault, (world.attempt,) * 2, *world.progress(fault.process))
        world.take_felt(task.SLOW)
        world.tell(task.SLOW, {"process": fault.process, "seconds": fault.seconds})
        self._wait_with_steps(lambda: world.take_felt(task.SLOW), f"anybody who meets {fault}")
        world.tell(task.SLOW, None)
        return done

    def _jump(self, fault: Fault) -> Delivery:
        world = self._world
        done = Delivery(fault, (world.attempt,) * 2, *world.progress(fault.process))
        world.take_felt(task.CLOCK)
        world.tell(task.CLOCK, fault.jump_seconds)
        self._jumps += 1
        number = self._jumps
        world.wait(lambda: world.take_felt(task.CLOCK), f"anybody who sees {fault}")

        def back() -> None:
            done.attempts = (done.attempts[0], world.attempt)
            if number == self._jumps:
                world.tell(task.CLOCK, None)

        world.later(fault.seconds, back)
        return done
