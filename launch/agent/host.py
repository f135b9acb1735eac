"""What the controller does on a machine that it reaches by ssh: one command a line, JSON, on
standard input; each is answered by one line with the same `id`, after any number of lines of
`output`.

`code` is followed by an archive's bytes. `relay` is the last command: from then on the connection
leads to an agent (see `served`).
"""

import contextlib
import fcntl
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from typing import Any

from launch.agent import chips, cloud, processes
from launch.agent.process import read

_PORTS = range(20000, 30000)  # Below those that the kernel gives to whoever asks for any.
_COME_SECONDS = 20.0  # How long an agent may take to be there.
_END_SECONDS = 10.0  # How long one may take to be gone.
_COPY_BYTES = 1 << 16


class HostError(Exception):
    """Something on this host is not as it must be; its text is for the user."""


class Host:
    """This machine, and what Muster has on it: below `~/.muster`."""

    def __init__(self, home, root):
        self._home = home
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

    def code(self, digest, size):
        """Keep an archive of code, whose bytes follow if it is not there; its folder."""
        folder = os.path.join(self._home, "code", digest)
        there = os.path.isdir(folder)
        _answer(event="output", there=there)
        if there:
            return {"folder": folder, "sent": 0}
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        beside = "%s.%d" % (folder, os.getpid())
        # As it comes: an archive need not fit into memory.
        part: Any = _Part(sys.stdin, size)
        with tarfile.open(fileobj=part, mode="r|gz") as tar:
            tar.extractall(beside)
        while part.read(_COPY_BYTES):  # What pads it.
            pass
        try:
            os.rename(beside, folder)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
        return {"folder": folder, "sent": size}

    def set_up(self, key, commands, cwd, env):
        """Run shell commands, once for the same key; what they print is kept, and passed on."""
        folder = os.path.join(self._home, "setup", key)
        with self._once(folder) as done:
            for command in () if done else commands:
                log = os.path.join(folder, "output.log")
                code = _run(command, cwd, dict(os.environ, **env), log)
                if code:
                    raise HostError("setup command %r ended with exit code %d" % (command, code))
        return {"ran": not done, "folder": folder}

    def environment(self, key, python, arguments, cwd):
        """Make a virtual environment, once for the same key; the folder of its programs.

        Args:
          key: what its content depends on.
          python: the interpreter that it is made from.
          arguments: of `pip install`; with none, there is no environment but the interpreter's own.
          cwd: where these are to be understood.
        """
        folder = os.path.join(self._home, "env", key)
        venv = os.path.join(folder, "venv")
        pip = [os.path.join(venv, "bin", "python"), "-m", "pip", "--disable-pip-version-check"]
        with self._once(folder) as done:
            # `--clear`: what another one left half made.
            commands = ([python, "-m", "venv", "--clear", venv], [*pip, "install", *arguments])
            for argv in () if done else commands:
                code = _run(argv, cwd, dict(os.environ), os.path.join(folder, "output.log"))
                if code:
                    raise HostError("%r ended with exit code %d" % (" ".join(argv), code))
        return {"ran": not done, "bin": os.path.join(venv, "bin")}

    @contextlib.contextmanager
    def _once(self, folder):
        """Whether something has been done that is done only once; if it goes well, it has been.
        A connection that broke may have left somebody doing it: waits for that."""
        os.makedirs(folder, mode=0o700, exist_ok=True)
        done = os.path.join(folder, "done")
        with open(os.path.join(folder, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield os.path.exists(done)
            with open(done, "w"):
                pass

    def storage(self, place, metadata, api):
        """Try whether a place can be written from this machine.

        Args:
          place: a directory, or `gs://BUCKET/PATH`.
          metadata: the metadata server.
          api: the root of Cloud Storage's JSON API.
        """
        name = ".muster-tries-%s-%d" % (os.uname().nodename, os.getpid())
        try:
            if place.startswith("gs://"):
                cloud.try_bucket(metadata, api, place, name)
            else:
                os.makedirs(place, exist_ok=True)
                path = os.path.join(place, name)
                with open(path, "w"):
                    pass
                os.unlink(path)
        except (OSError, ValueError, KeyError) as error:
            raise HostError("%s cannot be written: %s" % (place, error)) from error
        return {}

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
        _answer(event="relayed")
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


class _Part:
    """The next bytes of a stream, as a stream of their own."""

    def __init__(self, stream, size):
        self._stream = stream
        self._left = size

    def read(self, size=-1):
        """See io.BufferedReader."""
        size = self._left if size < 0 else min(size, self._left)
        data = self._stream.read(size)
        self._left -= len(data)
        return data


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


def _run(command, cwd, env, log):
    """Run a command to its end, passing on what it prints; its exit code."""
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        popen = subprocess.Popen(
            command if isinstance(command, list) else ["bash", "-c", command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=processes.die_with_parent(os.getpid()),  # noqa: PLW1509 (no threads here)
        )
        output: Any = popen.stdout
        for line in output:
            file.write(line)
            file.flush()
            _answer(event="output", line=line.decode("utf-8", "replace").rstrip("\n"))
    return popen.wait()


def _copy_both_ways(connection):
    """Until one side ends."""
    connection.setblocking(True)
    while True:
        readable, _, _ = select.select([0, connection], [], [])
        if connection in readable:
            data = connection.recv(_COPY_BYTES)
            if not data:
                return
            _write_all(data)
        if 0 in readable:
            data = os.read(0, _COPY_BYTES)
            if not data:
                return
            connection.sendall(data)


def _write_all(data):
    while data:
        data = data[os.write(1, data) :]


def _answer(**message):
    _write_all(json.dumps(message).encode() + b"\n")


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
        _answer(event="result", id=number, **result)
