"""One per host: start this host's processes, keep their output, watch, kill, write exit records.

Runs on a bare Python 3.9 and imports nothing but the standard library: it is also copied to hosts
that have no Muster.

It talks JSON, one object a line. Its first line of input is the plan:

    {"schema": 1, "host": NAME, "max_grace_seconds": SECONDS, "processes": [
        {"process_id": ID, "argv": [...], "env": {...over the agent's own...},
         "log": FILE, "exit_record": FILE, "progress": FILE}, ...]}

Then it takes commands, `{"command": "stop"}` (SIGTERM) and `{"command": "kill"}` (SIGKILL), for
every process group. End of input means that the owner is gone: stop, wait `max_grace_seconds`,
kill. It reports events: `started`, `not_started`, `exited`, and `done` as the last.

How nothing is left behind: every process leads a session and process group of its own; when it
ends, its group is killed before its id is free again. The agent is the 'subreaper', so whatever
left its group becomes the agent's own child, and is killed at the end. Should the agent be killed,
the kernel kills the processes (PR_SET_PDEATHSIG), and the launcher, a subreaper too, the rest.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time

SCHEMA = 1
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SWEEP_SECONDS = 2.0  # How long a killed process may take to be gone; longer only in a stuck I/O.


def prctl(option, value):
    """Call prctl(2) where there is one (Linux)."""
    import ctypes  # Here, because the launcher reads this module before it needs it.

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


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _write_json(path, record):
    temporary = "%s.%d.tmp" % (path, os.getpid())
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(record, file)
    os.replace(temporary, path)


class Agent:
    """Runs one plan to its end."""

    def __init__(self, plan, leftover=b""):
        self._plan = plan
        self._running = {}  # pid -> (process of the plan, its start in seconds since the epoch)
        self._input = leftover
        self._owner_gone = False
        self._deadline = None  # When to kill, on the monotonic clock; None while there is an owner.

    def run(self):
        """Start everything, see it through, leave nothing."""
        become_subreaper()
        wakeup = self._set_up_signals()
        for process in self._plan["processes"]:
            self._start(process)
        self._obey(b"")  # Commands that came right behind the plan.
        while True:
            self._reap()
            if not self._running:
                break
            wait = None if self._deadline is None else max(0, self._deadline - time.monotonic())
            ready = select.select([wakeup] if self._owner_gone else [wakeup, 0], [], [], wait)[0]
            if wakeup in ready:
                os.read(wakeup, 4096)
            if 0 in ready:
                self._read_input()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._signal(signal.SIGKILL)
                self._deadline = time.monotonic() + 1
        self._report(event="done", leftover=kill_descendants())

    def _set_up_signals(self):
        """Make SIGCHLD wake select, and a signal to the agent count as the owner's going."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._lose_owner())
        return read_end

    def _start(self, process):
        """Start one process in a session of its own, its output straight onto its log."""
        parent = os.getpid()

        def die_with_agent():
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # The agent died before the line above took effect.
                os._exit(1)

        log = os.open(process["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        process_id = process["process_id"]
        now = time.time()
        try:
            child = subprocess.Popen(
                process["argv"],
                env=dict(os.environ, **process["env"]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_agent,  # noqa: PLW1509 (there are no threads here)
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            message = "%s: %s" % (process["argv"][0], reason)
            record = {"schema": SCHEMA, "process_id": process_id, "host": self._plan["host"]}
            record.update(not_started=message, started_at=utc(now), ended_at=utc(now))
            _write_json(process["exit_record"], record)
            self._report(event="not_started", process_id=process_id, message=message, time=now)
            return
        finally:
            os.close(log)
        child.returncode = 0  # Popen must not wait for it: _reap does.
        self._running[child.pid] = (process, now)
        self._report(event="started", process_id=process_id, pid=child.pid, time=now)

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
            if ended.si_pid in self._running:
                _kill(os.killpg, ended.si_pid, signal.SIGKILL)
                process, started = self._running.pop(ended.si_pid)
                self._record_exit(process, started, ended)
            os.waitpid(ended.si_pid, 0)

    def _record_exit(self, process, started, ended):
        """Write the exit record, then report."""
        now = time.time()
        by_signal = ended.si_code != os.CLD_EXITED
        how = {
            "exit_code": None if by_signal else ended.si_status,
            "signal": ended.si_status if by_signal else None,
        }
        record = {
            "schema": SCHEMA,
            "process_id": process["process_id"],
            "host": self._plan["host"],
            "pid": ended.si_pid,
            "started_at": utc(started),
            "ended_at": utc(now),
            "progress": _read_json(process["progress"]),
        }
        record.update(how)
        try:
            _write_json(process["exit_record"], record)
        except OSError as error:  # A full disk must not keep the launcher from hearing of it.
            sys.stderr.write("cannot write %s: %s\n" % (process["exit_record"], error))
        self._report(event="exited", process_id=process["process_id"], time=now, **how)

    def _read_input(self):
        data = os.read(0, 65536)
        if data:
            self._obey(data)
        else:
            self._lose_owner()

    def _obey(self, data):
        """Carry out the commands that are complete."""
        lines = (self._input + data).split(b"\n")
        self._input = lines.pop()
        for line in lines:
            command = json.loads(line)["command"]
            self._signal(signal.SIGTERM if command == "stop" else signal.SIGKILL)

    def _lose_owner(self):
        """Stop by oneself."""
        if not self._owner_gone:
            self._owner_gone = True
            self._deadline = time.monotonic() + self._plan["max_grace_seconds"]
            self._signal(signal.SIGTERM)

    def _signal(self, number):
        for pid in self._running:
            _kill(os.killpg, pid, number)

    def _report(self, **event):
        # Without an owner nobody hears it; end of input says that it is gone.
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(event).encode() + b"\n")


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
