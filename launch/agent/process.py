"""One process of the plan: what it reports, what state it is in, what ended it."""

import json
import os
import re
import signal
import time

from launch import contract
from launch.agent.processes import send

_STACKS_SECONDS = 3.0  # How long it may take to write its stacks.
_STACKS_BYTES = 1 << 16  # Most that is reported of them.
STACKS_SIGNAL_OFFSET = 7  # SIGRTMIN + 7 asks a process for its stacks (launch/hook/sitecustomize).


def read(path):
    """A small file's bytes; b"" where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _read_json(path):
    """A JSON object from a file; None where there is none, or half of one."""
    try:
        record = json.loads(read(path))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class Process:
    """One process of the plan, and what is known of it."""

    def __init__(self, plan, log, pid):
        self.plan = plan
        self.log = log
        self.pid = pid
        self.started = time.time()
        self.told_at = None  # When a signal of ours was sent, on both clocks.
        self.told_time = None
        self.progress = None  # The last report that was read.
        self.changed_at = None  # When its step or phase changed last.
        self.unsaid = False  # Whether that has still to be reported.
        self.failure = None
        self._oom_kills = {"/proc/vmstat": _oom_kills("/proc/vmstat")}  # By what counts them.
        self._oom_counter = None
        self._look_at_cgroup()
        self.asked = None  # (when, size of the stacks file) while stacks are awaited.

    def look(self):
        """Read its progress and its exception; whether the exception is new."""
        self._look_at_cgroup()
        # Twice, because it is written in place: half of a report differs from the next look.
        data = read(self.plan["progress"])
        if data and data == read(self.plan["progress"]):
            self._take_report(data)
        if self.failure is None:
            # Where it could not write the file, it has said so beside its progress.
            self.failure = _read_json(self.plan["failure"]) or (self.progress or {}).get("failure")
            return self.failure is not None
        return False

    def _look_at_cgroup(self):
        """Note where it is, which may change: when it has ended it is nowhere any more."""
        counter = _oom_kill_counter(self.pid)
        if counter != self._oom_counter and counter is not None:
            self._oom_counter = counter
            self._oom_kills.setdefault(counter, _oom_kills(counter))

    def _take_report(self, data):
        try:
            report = json.loads(data)
            step, phase = report["step"], report["phase"]
        except (ValueError, TypeError, KeyError):
            return
        if type(step) is not int or not isinstance(phase, str):
            return
        before = self.progress
        self.progress = report
        if before is None or (before["step"], before["phase"]) != (step, phase):
            self.changed_at = time.monotonic()
            self.unsaid = True

    def state(self):
        """The letter of its state, and what of the kernel it waits in."""
        status = read("/proc/%d/stat" % self.pid).rpartition(b")")[2].split()
        where = read("/proc/%d/wchan" % self.pid).decode("ascii", "replace")
        return (status[0].decode() if status else ""), where

    def answers(self):
        """Whether it catches the signal that asks for stacks, so that it does not die of it."""
        number = signal.SIGRTMIN + STACKS_SIGNAL_OFFSET
        caught = re.search(rb"^SigCgt:\s*(\w+)$", read("/proc/%d/status" % self.pid), re.M)
        return bool(caught and int(caught.group(1), 16) >> (number - 1) & 1)

    def ask_for_stacks(self):
        """Ask for its stacks, and note its state beside them; whether it will answer."""
        state, where = self.state()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with open(os.open(self.plan["stacks"], flags, 0o600), "a") as file:
            now = contract.utc(time.time())
            file.write("--- asked at %s: state %s, in %s\n" % (now, state, where or "?"))
            size = file.tell()
        if state in ("T", "t") or not self.answers():  # Who is stopped would answer later.
            return False
        self.asked = (time.monotonic(), size, size)
        # To the process alone; its group's other members have no handler.
        send(os.kill, self.pid, signal.SIGRTMIN + STACKS_SIGNAL_OFFSET)
        return True

    def stacks(self):
        """Its stacks, once all of them are there or their time is over; None until then."""
        if self.asked is None:
            return None
        asked_at, start, last_size = self.asked
        data = read(self.plan["stacks"])
        quiet = len(data) == last_size > start
        if not quiet and time.monotonic() <= asked_at + _STACKS_SECONDS:
            self.asked = (asked_at, start, len(data))
            return None
        return data[start : start + _STACKS_BYTES].decode("utf-8", "replace")

    def exit_record(self, host, ended, oom_killed, peak_memory_bytes):
        """What is kept of its end; closes its log.

        `peak_memory_bytes` is the most that was resident of the process, or of one of its children
        that it had waited for.
        """
        by_signal = ended.si_code != os.CLD_EXITED
        progress = self.progress or {}
        record = {
            "schema": contract.SCHEMA,
            "process_id": self.plan["process_id"],
            "host": host,
            "pid": self.pid,
            "exit_code": None if by_signal else ended.si_status,
            "signal": ended.si_status if by_signal else None,
            "started_at": contract.utc(self.started),
            "ended_at": contract.utc(time.time()),
            "told_at": self.told_time and contract.utc(self.told_time),
            "step": progress.get("step"),
            "phase": progress.get("phase"),
            "progress": self.progress,
            "exception": self.failure,
            "oom_killed": oom_killed,
            "peak_memory_bytes": peak_memory_bytes,
            "last_lines": self.log.last_lines(),
            "log_dropped_bytes": self.log.dropped,
        }
        self.log.close()
        return record

    def was_oom_killed(self, number):
        """Whether the kernel ended it for want of memory."""
        if number != signal.SIGKILL or self.told_at is not None:
            return False
        more = {file: _oom_kills(file) > before for file, before in self._oom_kills.items()}
        # Where its cgroup cannot be read, the machine's own count must do.
        return more["/proc/vmstat"] and more.get(self._oom_counter or "", True)


def _oom_kill_counter(pid):
    """The file that counts what the kernel killed for want of memory in a process's cgroup; None
    where there is none, and of a zombie, which has left its cgroup."""
    for line in read("/proc/%d/cgroup" % pid).decode("utf-8", "replace").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            file = "/sys/fs/cgroup/memory%s/memory.oom_control" % path
        elif not controllers:
            file = "/sys/fs/cgroup%s/memory.events" % path
        else:
            continue
        if path != "/" and os.path.exists(file):
            return file
    return None


def _oom_kills(file):
    """How often the kernel killed for want of memory, by a file that says `oom_kill N`."""
    found = re.search(rb"^oom_kill (\d+)$", read(file), re.MULTILINE)
    return int(found.group(1)) if found else 0
