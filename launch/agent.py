"""One per host: start this host's processes, keep their output, watch, kill, write exit records.

Runs on a bare Python 3.9 and imports nothing but the standard library: it is also copied to hosts
that have no Muster.

It talks JSON, one object a line. Its first line of input is the plan:

    {"schema": 1, "host": NAME, "lease_seconds": S, "max_grace_seconds": S, "max_log_bytes": N,
     "hook": DIRECTORY or null, "processes": [
        {"process_id": ID, "argv": [...], "env": {...over the agent's own...}, "log": FILE,
         "exit_record": FILE, "progress": FILE, "failure": FILE, "stacks": FILE}, ...]}

Then it takes commands: `{"command": "lease", "echo": X}`, `stop` (SIGTERM) and `kill` (SIGKILL) for
every process group, and `stacks`. It reports events: `started`, `not_started`, `pulse` (the answer
to a lease, with the progress that is new), `raised` (a process recorded an exception), `exited`,
`stacks`, and `done` as the last. Times in events are seconds of this host's monotonic clock.

Nothing outlives the lease. A lease counts from the last answer before it, which was given before
the owner sent it: so whoever has waited a lease's time in vain knows that the processes are gone.
End of input means at once that the owner is gone: stop, wait `max_grace_seconds`, kill.

How nothing is left behind: every process leads a session and process group of its own; when it
ends, its group is killed before its id is free again. The agent is the 'subreaper', so whatever
left its group becomes the agent's own child, and is killed at the end. Should the agent be killed,
the kernel kills the processes (PR_SET_PDEATHSIG), and the launcher, a subreaper too, the rest.
"""

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

SCHEMA = 1
STACKS_SIGNAL_OFFSET = 7  # SIGRTMIN + 7 asks a process for its stacks (launch/hook/sitecustomize).
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_FALLOC_FL_COLLAPSE_RANGE = 8
_SWEEP_SECONDS = 2.0  # How long a killed process may take to be gone; longer only in a stuck I/O.
_POLL_SECONDS = 0.1  # Between two looks at progress, exceptions and the size of logs.
_STACKS_SECONDS = 3.0  # How long a process may take to write its stacks.
_QUIET_SECONDS = 0.05  # What is written in a burst is complete after this.
_STACKS_BYTES = 1 << 16  # Most that is reported of one process's stacks.
_LAST_LINES = 80  # After an abort, C++ prints some 50 lines behind the traceback.
_LINE_CHARACTERS = 500
_TAIL_BYTES = 1 << 16
_COPY_BYTES = 1 << 20


def prctl(option, value):
    """Call prctl(2) where there is one (Linux)."""
    function = getattr(ctypes.CDLL(None), "prctl", None)
    if function:
        function(option, value, 0, 0, 0)


def become_subreaper():
    """Make orphans among this process's descendants its own children."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(root, spare=()):
    """Process ids below `root`, found in /proc; those in `spare` and what is below them are not."""
    children: dict = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            try:
                with open("/proc/%s/stat" % name, "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # It ended meanwhile.
            children.setdefault(int(fields[1]), []).append(int(name))
    found, queue = [], [root]
    while queue:
        below = [pid for pid in children.get(queue.pop(), ()) if pid not in spare]
        found += below
        queue += below
    return found


def kill_descendants(spare=()):
    """Kill whatever is below this process, and wait until it is gone.

    Returns:
      The process ids that would not go within a time limit.
    """
    limit = time.monotonic() + _SWEEP_SECONDS
    while True:
        left = descendants(os.getpid(), spare)
        for pid in left:
            _kill(os.kill, pid, signal.SIGKILL)
            # Not ours yet? It becomes ours when its parent has died.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not left or time.monotonic() > limit:
            return left
        time.sleep(0.005)


def _kill(function, target, number):
    # Gone already, or it became another user's (setuid).
    with contextlib.suppress(ProcessLookupError, PermissionError):
        function(target, number)


def utc(seconds):
    """Seconds since the epoch as ISO 8601 in UTC."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return "%s.%06dZ" % (whole, seconds % 1 * 1e6)


def _read(path):
    """A small file's bytes; b"" where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _read_json(path):
    """A JSON object from a file; None where there is none, or half of one."""
    try:
        record = json.loads(_read(path))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _write_json(path, record):
    temporary = "%s.%d.tmp" % (path, os.getpid())
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(record, file)
    os.replace(temporary, path)


class Log:
    """One process's log, to which the process itself writes: its beginning and its end are kept.

    What is cut out of the live file goes to segments beside it, named by the offset of their first
    byte in the whole output: `LOG.0`, the beginning, and the last one before the live file.
    """

    def __init__(self, path, max_bytes):
        self.path = path
        self.dropped = 0  # Bytes of the output that are kept nowhere.
        self._segment_bytes = max_bytes // 3
        self._start = 0  # Offset of the live file's first byte in the whole output.
        self._previous = None  # The newest segment but `LOG.0`.
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)

    def trim(self):
        """Cut the live file where it has grown too long."""
        size = os.fstat(self.fd).st_size
        if size <= self._segment_bytes:
            return
        # Whole blocks, and not the last: so much can be cut from a file's beginning at once.
        block = os.fstatvfs(self.fd).f_bsize
        length = (size - 1) // block * block
        newest = self._keep(length)
        if not _collapse(self.fd, length):
            length = self._copy_and_truncate(newest, length)
        self._start += length

    def last_lines(self):
        """The last lines that are not empty."""
        size = os.fstat(self.fd).st_size
        data = os.pread(self.fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        if size < _TAIL_BYTES and self._start:
            data = _read(self._previous or self.path + ".0")[-_TAIL_BYTES:] + data
        lines = data.decode("utf-8", "replace").splitlines()
        return [line[:_LINE_CHARACTERS] for line in lines if line.strip()][-_LAST_LINES:]

    def close(self):
        """Give the file back."""
        os.close(self.fd)

    def _keep(self, length):
        """Copy what is kept of the live file's first `length` bytes; the newest segment's name."""
        behind, newest = 0, self._previous or self.path + ".0"
        if self._start == 0:
            behind = min(length, self._segment_bytes)
            self._copy(self.path + ".0", 0, behind)
        first = max(behind, length - self._segment_bytes)
        if first < length:
            newest = "%s.%d" % (self.path, self._start + first)
            self._copy(newest, first, length)
            self.dropped += first - behind
            if self._previous:
                self.dropped += os.path.getsize(self._previous)
                os.unlink(self._previous)
            self._previous = newest
        return newest

    def _copy(self, path, first, last):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
            while first < last:
                data = os.pread(self.fd, min(_COPY_BYTES, last - first), first)
                if not data:
                    break
                file.write(data)
                first += len(data)

    def _copy_and_truncate(self, newest, length):
        """Where a file cannot be cut in front; what is written in the very moment is lost."""
        while True:
            size = os.fstat(self.fd).st_size
            if size <= length:
                os.ftruncate(self.fd, 0)
                return length
            self._copy(newest, length, size)
            length = size


def _collapse(fd, length):
    """Remove a file's first bytes, whatever is being appended to it; False if it cannot be."""
    fallocate = getattr(ctypes.CDLL(None), "fallocate", None)
    if fallocate is None:
        return False
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return fallocate(fd, _FALLOC_FL_COLLAPSE_RANGE, 0, length) == 0


def _oom_kill_counter(pid):
    """The file that counts what the kernel killed for want of memory in a process's cgroup."""
    for line in _read("/proc/%d/cgroup" % pid).decode("utf-8", "replace").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            return "/sys/fs/cgroup%s/memory.events" % path
        if "memory" in controllers.split(","):
            return "/sys/fs/cgroup/memory%s/memory.oom_control" % path
    return None


def _oom_kills(file):
    """How often the kernel killed for want of memory, by a file that says `oom_kill N`."""
    found = re.search(rb"^oom_kill (\d+)$", _read(file), re.MULTILINE) if file else None
    return int(found.group(1)) if found else 0


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
        self.oom_counter = _oom_kill_counter(pid)
        self.oom_kills = _oom_kills(self.oom_counter), _oom_kills("/proc/vmstat")
        self.asked = None  # (when, size of the stacks file) while stacks are awaited.

    def look(self):
        """Read its progress and its exception; whether the exception is new."""
        # Twice, because it is written in place: half of a report differs from the next look.
        data = _read(self.plan["progress"])
        if data and data == _read(self.plan["progress"]):
            self._take_report(data)
        if self.failure is None:
            self.failure = _read_json(self.plan["failure"])
            return self.failure is not None
        return False

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
        status = _read("/proc/%d/stat" % self.pid).rpartition(b")")[2].split()
        where = _read("/proc/%d/wchan" % self.pid).decode("ascii", "replace")
        return (status[0].decode() if status else ""), where

    def answers(self):
        """Whether it catches the signal that asks for stacks, so that it does not die of it."""
        number = signal.SIGRTMIN + STACKS_SIGNAL_OFFSET
        caught = re.search(rb"^SigCgt:\s*(\w+)$", _read("/proc/%d/status" % self.pid), re.M)
        return bool(caught and int(caught.group(1), 16) >> (number - 1) & 1)

    def was_oom_killed(self, number):
        """Whether the kernel ended it for want of memory; only while it is a zombie."""
        if number != signal.SIGKILL or self.told_at is not None:
            return False
        here, anywhere = self.oom_kills
        if _oom_kills("/proc/vmstat") <= anywhere:
            return False
        counter = _oom_kill_counter(self.pid) or self.oom_counter
        if counter != self.oom_counter:
            here = 0  # It has moved since; nobody looked at that cgroup before.
        # Where cgroups cannot be read, the machine's own count must do.
        return not os.path.exists(counter or "") or _oom_kills(counter) > here


class Agent:
    """Runs one plan to its end."""

    def __init__(self, plan, leftover=b""):
        self._plan = plan
        self._running = {}  # pid -> Process
        self._unread = leftover
        self._unsent = b""
        self._answered_at = time.monotonic()  # The plan counts as the first lease.
        self._lease_until = self._answered_at + plan["lease_seconds"]
        self._input_open = True
        self._kill_at = None  # Once nothing but the end is left.

    def run(self):
        """Start everything, see it through, leave nothing."""
        become_subreaper()
        wakeup = self._set_up_signals()
        os.set_blocking(1, False)
        for process in self._plan["processes"]:
            self._start(process)
        self._obey(b"")  # Commands that came right behind the plan.
        while True:
            self._reap()
            if not self._running:
                break
            self._check_lease()
            self._look()
            self._wait(wakeup)
        self._report(event="done", leftover=kill_descendants())
        self._say_the_rest()

    def _wait(self, wakeup):
        """Wait for a command, the end of a process, or the time of the next look."""
        awaited = any(process.asked for process in self._running.values())
        seconds = _QUIET_SECONDS / 2 if awaited else _POLL_SECONDS
        readable = [wakeup, 0] if self._input_open else [wakeup]
        ready = select.select(readable, [1] if self._unsent else [], [], seconds)
        if wakeup in ready[0]:
            os.read(wakeup, 4096)
        # Before the input is read: an agent that was itself suspended must not find a lease there
        # that came in time, and go on. Its owner has given it up.
        self._check_lease()
        if 0 in ready[0]:
            data = os.read(0, 65536)
            if data:
                self._obey(data)
            else:
                self._lose_owner()
        if 1 in ready[1]:
            self._flush()

    def _set_up_signals(self):
        """Make SIGCHLD wake select, and a signal to the agent count as the owner's going."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._lose_owner())
        return read_end

    def _start(self, plan):
        """Start one process in a session of its own, its output straight onto its log."""
        parent = os.getpid()

        def die_with_agent():
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # The agent died before the line above took effect.
                os._exit(1)

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
                preexec_fn=die_with_agent,  # noqa: PLW1509 (there are no threads here)
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
        now = utc(time.time())
        record = {"schema": SCHEMA, "process_id": plan["process_id"], "host": self._plan["host"]}
        record.update(not_started=message, started_at=now, ended_at=now)
        self._write_record(plan, record)
        self._report(event="not_started", process_id=plan["process_id"], message=message)

    # ------------------------------------------------------------------ what the owner says

    def _obey(self, data):
        """Carry out the commands that are complete."""
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["command"] == "lease":
                self._renew(message["echo"])
            elif message["command"] == "stacks":
                for process in self._running.values():
                    self._ask_for_stacks(process)
            else:
                stop = message["command"] == "stop"
                self._signal(signal.SIGTERM if stop else signal.SIGKILL)

    def _renew(self, echo):
        # From the last answer on, after which the owner sent this: see the module's text.
        self._lease_until = self._answered_at + self._plan["lease_seconds"]
        new = [process for process in self._running.values() if process.unsaid]
        progress = [
            [p.plan["process_id"], p.progress["step"], p.progress["phase"], p.changed_at]
            for p in new
        ]
        for process in new:
            process.unsaid = False
        self._answered_at = time.monotonic()
        self._report(event="pulse", echo=echo, progress=progress)

    def _check_lease(self):
        """Stop in time before the lease is over, and kill when something's time is up."""
        now = time.monotonic()
        grace = min(self._plan["max_grace_seconds"], self._plan["lease_seconds"] / 3)
        if self._kill_at is None and now >= self._lease_until - grace:
            self._kill_at = self._lease_until
            self._signal(signal.SIGTERM)
        if self._kill_at is not None and now >= self._kill_at:
            self._signal(signal.SIGKILL)
            self._kill_at = now + 1

    def _lose_owner(self):
        """Stop by oneself."""
        self._input_open = False
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._plan["max_grace_seconds"]
            self._signal(signal.SIGTERM)

    def _signal(self, number):
        for process in self._running.values():
            if process.told_at is None:
                process.told_at, process.told_time = time.monotonic(), time.time()
            _kill(os.killpg, process.pid, number)

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
            if process.asked:
                self._collect_stacks(process)
            self._trim(process)

    def _trim(self, process):
        try:
            process.log.trim()
        except OSError as error:  # A full disk, say: the process writes on as it can.
            self._complain("cannot shorten %s" % process.plan["log"], error)

    def _ask_for_stacks(self, process):
        state, where = process.state()
        try:
            with open(process.plan["stacks"], "a") as file:
                now = utc(time.time())
                file.write("--- asked at %s: state %s, in %s\n" % (now, state, where or "?"))
                size = file.tell()
        except OSError as error:
            self._complain("cannot write %s" % process.plan["stacks"], error)
            size = 0
        process.asked = (time.monotonic(), size, size)
        if process.answers():
            # To the process alone; its group's other members have no handler.
            _kill(os.kill, process.pid, signal.SIGRTMIN + STACKS_SIGNAL_OFFSET)
        else:
            self._report_stacks(process, "")

    def _collect_stacks(self, process):
        """Report stacks when all of them are there, or when their time is over."""
        asked_at, start, last_size = process.asked
        data = _read(process.plan["stacks"])
        now = time.monotonic()
        quiet = len(data) == last_size > start
        if quiet or now > asked_at + _STACKS_SECONDS:
            text = data[start : start + _STACKS_BYTES].decode("utf-8", "replace")
            self._report_stacks(process, text)
        else:
            process.asked = (asked_at, start, len(data))

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
            _kill(os.killpg, ended.si_pid, signal.SIGKILL)
            ended_at = time.monotonic()
            oom_killed = process.was_oom_killed(ended.si_status)
            usage = os.wait4(ended.si_pid, 0)[2]
            self._record_exit(process, ended, ended_at, oom_killed, usage.ru_maxrss * 1024)

    def _record_exit(self, process, ended, ended_at, oom_killed, peak_memory_bytes):
        """Write the exit record, then report.

        `peak_memory_bytes` is the most that was resident of the process, or of one of its children
        that it had waited for.
        """
        process.look()
        self._trim(process)
        by_signal = ended.si_code != os.CLD_EXITED
        progress = process.progress or {}
        record = {
            "schema": SCHEMA,
            "process_id": process.plan["process_id"],
            "host": self._plan["host"],
            "pid": process.pid,
            "exit_code": None if by_signal else ended.si_status,
            "signal": ended.si_status if by_signal else None,
            "started_at": utc(process.started),
            "ended_at": utc(time.time()),
            "told_at": process.told_time and utc(process.told_time),
            "step": progress.get("step"),
            "phase": progress.get("phase"),
            "progress": process.progress,
            "exception": process.failure,
            "oom_killed": oom_killed,
            "peak_memory_bytes": peak_memory_bytes,
            "last_lines": process.log.last_lines(),
            "log_dropped_bytes": process.log.dropped,
        }
        process.log.close()
        self._write_record(process.plan, record)
        if not _read(process.plan["stacks"]):
            with contextlib.suppress(OSError):
                os.unlink(process.plan["stacks"])
        self._report(
            event="exited",
            process_id=process.plan["process_id"],
            time=ended_at,
            told_at=process.told_at,
            record=record,
        )

    def _write_record(self, plan, record):
        try:
            _write_json(plan["exit_record"], record)
        except OSError as error:  # A full disk must not keep the owner from hearing of it.
            self._complain("cannot write %s" % plan["exit_record"], error)

    def _complain(self, what, error):
        with contextlib.suppress(OSError):
            sys.stderr.write("%s: %s\n" % (what, error))
            sys.stderr.flush()

    # ------------------------------------------------------------------ what the owner is told

    def _report(self, **event):
        self._unsent += json.dumps(dict({"time": time.monotonic()}, **event)).encode() + b"\n"
        self._flush()

    def _flush(self):
        """Send what the owner takes. An owner that does not read must not keep the agent from
        its lease; without one nobody hears it, and end of input says that it is gone."""
        with contextlib.suppress(BlockingIOError):
            try:
                while self._unsent:
                    self._unsent = self._unsent[os.write(1, self._unsent) :]
            except BrokenPipeError:
                self._unsent = b""

    def _say_the_rest(self):
        """Before leaving, wait a lease's time for an owner that reads slowly."""
        limit = time.monotonic() + self._plan["lease_seconds"]
        while self._unsent and time.monotonic() < limit:
            select.select([], [1], [], 1.0)
            self._flush()


def main():
    """Read the plan and run it."""
    data = b""
    while b"\n" not in data:
        more = os.read(0, 65536)
        if not more:
            return  # The owner left before it said what to do.
        data += more
    line, _, leftover = data.partition(b"\n")
    Agent(json.loads(line), leftover).run()


if __name__ == "__main__":
    main()
