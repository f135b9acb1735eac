"""What the controller does on a machine that it reaches by ssh: one command a line, JSON, on
standard input; each is answered by one line with the same `id`, after any number of lines of
`output`.

`code` is followed by an archive's bytes. `relay` is the last command: from then on the connection
leads to an agent (see `served`).
"""

import contextlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

from launch.agent import chips, processes
from launch.agent.process import read
from launch.agent.provision import HostError, Provision, answer, write_all

_PORTS = range(20000, 30000)  # Below those that the kernel gives to whoever asks for any.
_COME_SECONDS = 20.0  # How long an agent may take to be there.
_END_SECONDS = 10.0  # How long one may take to be gone.
_COPY_BYTES = 1 << 16


class Host(Provision):
    """This machine, and what Muster has on it: below `~/.muster`."""

    def __init__(self, home, root):
        super().__init__(home)
        self._root = root  # Of Muster's own packages.

    # ------------------------------------------------------------------ commands

    def hello(self, run):
        """What this machine is, and which agents of a run are on it."""
        return {
            "python": platform.python_version(),
            "hostname": os.uname().nodename,
            "home": self._home,
            "free_bytes": shutil.disk_usage(self._home).free,
            "agents": [found["attempt"] for found in self._agents(run) if _alive(found)],
        }

    def clear(self, run, keep):
        """End what earlier attempts of a run have left, and make sure that the chips are free.

        Args:
          run: the run's id.
          keep: the attempt whose agent is to live on; None for none.
        """
        ended = []
        for found in self._agents(run):
            if found["attempt"] == keep or not _alive(found):
                continue
            _end(found)
            ended.append(found["pid"])
        if not any(found["attempt"] == keep and _alive(found) for found in self._agents(run)):
            ended += chips.free(run)
        return {"ended": ended}

    def port(self):
        """A port that nobody has."""
        start = os.getpid() + int(time.time())
        for number in range(len(_PORTS)):
            port = _PORTS[(start + number) % len(_PORTS)]
            with socket.socket() as one:
                try:
                    one.bind(("", port))
                except OSError:
                    continue
                return {"port": port}
        raise HostError("no port from %d on is free" % _PORTS[0])

    def start(self, run, attempt, python, patience, container):
        """Start an agent that outlives this connection, unless it is there.

        Args:
          run: the run's id.
          attempt: the number.
          python: the interpreter that runs it; "" for this one.
          patience: how many seconds its owner may take to bring the plan.
          container: what comes before the command, to run it in a container; [] for none.
        """
        there = [found for found in self._agents(run) if found["attempt"] == attempt]
        if there and not _alive(there[0]):
            raise HostError(
                "the agent of attempt %d is gone: it was killed, or has ended" % attempt
            )
        if there:
            return {"pid": there[0]["pid"], "started": False}
        folder = self._folder(run, attempt)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        path = self._socket(run, attempt)
        for old in (path, path + ".new"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(old)
        code = "import sys; sys.path.insert(0, sys.argv[1]); "
        code += "from launch.agent.served import main; main(sys.argv[2:])"
        argv = [
            *container,
            python or sys.executable,
            "-I",
            "-S",
            "-c",
            code,
            self._root,
            path,
            str(patience),
        ]
        log = os.open(
            os.path.join(folder, "agent.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        os.close(log)
        record = {"attempt": attempt, "pid": popen.pid, "ticks": _ticks(popen.pid)}
        with open(os.path.join(folder, "agent.json"), "w") as file:
            json.dump(dict(record, container=container), file)
        limit = time.monotonic() + _COME_SECONDS
        while not os.path.exists(path):
            if popen.poll() is not None or time.monotonic() > limit:
                said = read(os.path.join(folder, "agent.log")).decode("utf-8", "replace")
                raise HostError("the agent did not start: %s" % said[-1000:])
            time.sleep(0.02)
        return {"pid": popen.pid, "started": True}

    def relay(self, run, attempt):
        """Lead this connection to the agent of an attempt; does not come back."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self._socket(run, attempt))
        answer(event="relayed")
        _copy_both_ways(connection)
        os._exit(0)

    # ------------------------------------------------------------------ agents

    def _folder(self, run, attempt):
        return os.path.join(self._home, "runs", run, "attempts", "%03d" % attempt)

    def _socket(self, run, attempt):
        # Not deep in a folder: the kernel takes 107 bytes.
        return os.path.join(self._home, "%s-%d.socket" % (run, attempt))

    def _agents(self, run):
        """The records of the agents that were started for a run."""
        attempts = os.path.join(self._home, "runs", run, "attempts")
        names = sorted(os.listdir(attempts)) if os.path.isdir(attempts) else ()
        files = [read(os.path.join(attempts, name, "agent.json")) for name in names]
        return [json.loads(data) for data in files if data]


def _ticks(pid):
    """When a process was started, which tells it from a later one of the same id; None if gone."""
    words = read("/proc/%d/stat" % pid).rpartition(b")")[2].split()
    return int(words[19]) if words and words[0] not in (b"Z", b"X") else None


def _alive(agent):
    return _ticks(agent["pid"]) == agent["ticks"]


def _end(agent):
    """End an agent, and with it its processes: the kernel kills those of one that is killed."""
    if "--name" in agent["container"]:
        # What runs in a container is not below the command that started it.
        name = agent["container"][agent["container"].index("--name") + 1]
        subprocess.run([agent["container"][0], "kill", name], stdin=subprocess.DEVNULL, check=False)
    for number in (signal.SIGTERM, signal.SIGKILL):
        processes.send(os.kill, agent["pid"], number)
        limit = time.monotonic() + _END_SECONDS
        while _alive(agent):
            if time.monotonic() > limit:
                break
            time.sleep(0.05)
        else:
            return
    raise HostError("process %d, the agent of attempt %d, cannot be killed"
                    % (agent["pid"], agent["attempt"]))  # fmt: skip


def _copy_both_ways(connection):
    """Until one side ends."""
    connection.setblocking(True)
    while True:
        readable, _, _ = select.select([0, connection], [], [])
        if connection in readable:
            data = connection.recv(_COPY_BYTES)
            if not data:
                return
            write_all(data)
        if 0 in readable:
            data = os.read(0, _COPY_BYTES)
            if not data:
                return
            connection.sendall(data)


def main(home, root):
    """Carry out commands until there are no more."""
    host = Host(home, root)
    while True:
        line = sys.stdin.readline()
        if not line:
            return
        message = json.loads(line)
        number = message.pop("id")
        name = message.pop("command")
        try:
            result = dict(getattr(host, name)(**message), ok=True)
        except (HostError, chips.HeldError, OSError, subprocess.SubprocessError) as error:
            result = {"ok": False, "error": str(error)}
        answer(event="result", id=number, **result)
