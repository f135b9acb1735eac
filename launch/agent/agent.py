"""Runs one plan to its end; see the package's text for the protocol."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time

from launch import contract
from launch.agent.log import Log
from launch.agent.owner import Owner
from launch.agent.process import Process, read
from launch.agent.processes import become_subreaper, die_with_parent, kill_descendants, send

_POLL_SECONDS = 0.1  # Between two looks at progress, exceptions and the size of logs.
_QUIET_SECONDS = 0.05  # What is written in a burst is complete after this.
_SIGNAL_SECONDS = 0.2  # Within this a signal to all processes of a machine has reached them all.


class Agent:
    """Runs one plan to its end."""

    def __init__(self, plan, owner):
        self._plan = plan
        self._running = {}  # pid -> Process
        self._owner = owner
        self._answered_at = time.monotonic()  # The plan counts as the first lease.
        self._lease_until = self._answered_at + plan["lease_seconds"]
        self._deadline = self._answered_at + plan.get("unattended_seconds", 0)
        self._signalled = None  # When somebody else told this host to stop, on both clocks.
        self._told_signal = False
        self._kill_at = None  # Once nothing but the end is left.

    def run(self):
        """Start everything, see it through, leave nothing."""
        become_subreaper()
        wakeup = self._set_up_signals()
        for process in self._plan["processes"]:
            self._start(process)
        self._obey(self._owner.hear((), ()))  # Commands that came right behind the plan.
        while True:
            self._reap()
            if not self._running:
                break
            self._check_lease()
            self._tell_signal()
            self._look()
            self._wait(wakeup)
        self._owner.part(kill_descendants(), self._plan["lease_seconds"])

    def _wait(self, wakeup):
        """Wait for a command, the end of a process, or the time of the next look."""
        awaited = any(process.asked for process in self._running.values())
        seconds = _QUIET_SECONDS / 2 if awaited else _POLL_SECONDS
        to_read, to_write = self._owner.descriptors()
        readable, writable, _ = select.select([wakeup, *to_read], to_write, [], seconds)
        if wakeup in readable:
            os.read(wakeup, 4096)
        # Before the input is read: an agent that was itself suspended must not find a lease there
        # that came in time, and go on. Its owner has given it up.
        self._check_lease()
        self._obey(self._owner.hear(readable, writable))
        if self._owner.gone:
            self._lose_owner()

    def _set_up_signals(self):
        """Make SIGCHLD wake select; what a signal to the agent means, the plan says."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._be_signalled())
        return read_end

    def _be_signalled(self):
        """Stop; the owner decides for how long, if it is to hear of signals."""
        if not self._plan.get("tells_signals"):
            self._lose_owner()
        elif self._signalled is None:
            self._signalled = (time.monotonic(), time.time())

    def _start(self, plan):
        """Start one process in a session of its own, its output straight onto its log."""
        env = dict(os.environ, **plan["env"])
        if self._plan["hook"]:
            before = env.get("PYTHONPATH")
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [self._plan["hook"], before]))
        log = Log(plan["log"], self._plan["max_log_bytes"])
        try:
            child = subprocess.Popen(
                plan["argv"],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log.fd,
                stderr=log.fd,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 (there are no threads here)
            )
        except (OSError, ValueError) as error:
            log.close()
            reason = getattr(error, "strerror", None) or str(error)
            self._not_started(plan, "%s: %s" % (plan["argv"][0], reason))
            return
        child.returncode = 0  # Popen must not wait for it: _reap does.
        process = self._running[child.pid] = Process(plan, log, child.pid)
        self._report(event="started", process_id=plan["process_id"], pid=process.pid)

    def _not_started(self, plan, message):
        now = contract.utc(time.time())
        record = {
            "schema": contract.SCHEMA,
            "process_id": plan["process_id"],
            "host": self._plan["host"],
        }
        record.update(not_started=message, started_at=now, ended_at=now)
        self._write_record(plan, record)
        self._report(event="not_started", process_id=plan["process_id"], message=message)

    # ------------------------------------------------------------------ what the owner says

    def _obey(self, messages):
        """Carry out commands."""
        for message in messages:
            if message["command"] == "lease":
                self._renew(message["echo"])
            elif message["command"] == "stacks":
                for process in self._running.values():
                    self._ask_for_stacks(process)
            elif message["command"] == "stop":
                self._stop(message.get("seconds"))
            else:
                self._signal(signal.SIGKILL)

    def _renew(self, echo):
        # From the last answer on, after which the owner sent this: see the module's text.
        self._lease_until = self._answered_at + self._plan["lease_seconds"]
        new = [p for p in self._running.values() if p.unsaid or self._owner.is_new]
        self._owner.is_new = False
        progress = [
            [p.plan["process_id"], p.progress["step"], p.progress["phase"], p.changed_at]
            for p in new
            if p.progress
        ]
        for process in new:
            process.unsaid = False
        self._answered_at = time.monotonic()
        self._report(event="pulse", echo=echo, progress=progress)

    def _check_lease(self):
        """Stop in time before the lease is over, and kill when something's time is up."""
        now = time.monotonic()
        grace = min(self._plan["max_grace_seconds"], self._plan["lease_seconds"] / 3)
        until = max(self._lease_until, self._deadline)
        if self._kill_at is None and now >= until - grace:
            self._kill_at = until
            self._stop(until - now)
        if self._kill_at is not None and now >= self._kill_at:
            self._signal(signal.SIGKILL)
            self._kill_at = now + 1

    def _lose_owner(self):
        """Stop by oneself."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._plan["max_grace_seconds"]
            self._stop(self._plan["max_grace_seconds"])

    def _tell_signal(self):
        """Pass on that the machine is wanted back; its processes may have heard it as well."""
        if self._signalled is None or self._told_signal:
            return
        self._told_signal = True
        self._report(event="signalled")
        self._signal(signal.SIGTERM)

    def _stop(self, seconds):
        """Tell the processes to stop, and how long they have if that is known."""
        for process in self._running.values():
            if seconds is not None:
                try:
                    contract.record_deadline(process.plan["deadline"], seconds)
                except OSError as error:  # They then stop as if there were time.
                    self._complain("cannot write %s" % process.plan["deadline"], error)
        self._signal(signal.SIGTERM)

    def _signal(self, number):
        for process in self._running.values():
            if process.told_at is None:
                process.told_at, process.told_time = time.monotonic(), time.time()
            send(os.killpg, process.pid, number)

    # ------------------------------------------------------------------ what the processes do

    def _look(self):
        """Take in what the processes have written."""
        for process in self._running.values():
            if process.look():
                self._report(
                    event="raised",
                    process_id=process.plan["process_id"],
                    failure=process.failure,
                )
            text = process.stacks()
            if text is not None:
                self._report_stacks(process, text)
            self._trim(process)
        self._owner.look()

    def _trim(self, process):
        try:
            process.log.trim()
        except OSError as error:  # A full disk, say: the process writes on as it can.
            self._complain("cannot shorten %s" % process.plan["log"], error)

    def _ask_for_stacks(self, process):
        try:
            answers = process.ask_for_stacks()
        except OSError as error:
            self._complain("cannot write %s" % process.plan["stacks"], error)
            answers = False
        if not answers:
            self._report_stacks(process, "")

    def _report_stacks(self, process, text):
        process.asked = None
        self._report(
            event="stacks",
            process_id=process.plan["process_id"],
            state=process.state()[0],
            text=text,
        )

    def _reap(self):
        """Take every child that has ended; adopted orphans are reaped in passing."""
        while True:
            try:
                # Not reaped yet: while it is a zombie no other process can get its group's id.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            except ChildProcessError:
                return
            if ended is None:
                return
            process = self._running.pop(ended.si_pid, None)
            if process is None:
                os.waitpid(ended.si_pid, 0)
                continue
            send(os.killpg, ended.si_pid, signal.SIGKILL)
            ended_at = time.monotonic()
            oom_killed = process.was_oom_killed(ended.si_status)
            usage = os.wait4(ended.si_pid, 0)[2]
            self._record_exit(process, ended, ended_at, oom_killed, usage.ru_maxrss * 1024)

    def _record_exit(self, process, ended, ended_at, oom_killed, peak_memory_bytes):
        """Write the exit record, then report."""
        process.look()
        self._trim(process)
        by_signal = ended.si_code != os.CLD_EXITED
        if by_signal and ended.si_status == signal.SIGTERM and process.told_at is None:
            self._ask_who_signalled(process)
        record = process.exit_record(self._plan["host"], ended, oom_killed, peak_memory_bytes)
        self._write_record(process.plan, record)
        if not read(process.plan["stacks"]):
            with contextlib.suppress(OSError):
                os.unlink(process.plan["stacks"])
        self._report(
            event="exited",
            process_id=process.plan["process_id"],
            time=ended_at,
            told_at=process.told_at,
            record=record,
        )

    def _ask_who_signalled(self, process):
        """Whoever wants the machine back tells every process of it, and one may have died of it
        before the agent has heard."""
        limit = time.monotonic() + _SIGNAL_SECONDS
        while self._plan.get("tells_signals") and time.monotonic() < limit:
            if self._signalled is not None:
                process.told_at, process.told_time = self._signalled
                return
            time.sleep(0.01)

    def _write_record(self, plan, record):
        try:
            contract.write_atomically(plan["exit_record"], json.dumps(record), mode=0o600)
        except OSError as error:  # A full disk must not keep the owner from hearing of it.
            self._complain("cannot write %s" % plan["exit_record"], error)

    def _complain(self, what, error):
        with contextlib.suppress(OSError):
            sys.stderr.write("%s: %s\n" % (what, error))
            sys.stderr.flush()

    def _report(self, **event):
        self._owner.tell(**event)


def main(arguments):
    """Read the plan and run it.

    Args:
      arguments: none, when the owner is at the other end of standard input and output; or the file
        in which it says where it is, and the variable that names this host (see connect).
    """
    if arguments:
        from launch.agent.connect import find_owner  # Not for all: its hashes take time to load.

        door, variable = arguments
        find_owner(door, os.environ.get(variable) or os.uname().nodename)
    data = b""
    while b"\n" not in data:
        more = os.read(0, 65536)
        if not more:
            return  # The owner left before it said what to do.
        data += more
    line, _, leftover = data.partition(b"\n")
    plan = json.loads(line)
    if plan.get("complaints"):
        fd = os.open(plan["complaints"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, 2)
        os.close(fd)
    Agent(plan, Owner(leftover)).run()
