"""What is brought to a machine before a program can run on it: code, an environment, set-up."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
from typing import Any

from launch.agent import cloud, processes

_COPY_BYTES = 1 << 16


class HostError(Exception):
    """Something on this host is not as it must be; its text is for the user."""


class Provision:
    """Brings things below `~/.muster`, each once."""

    def __init__(self, home):
        self._home = home

    def code(self, digest, size):
        """Keep an archive of code, whose bytes follow if it is not there; its folder."""
        folder = os.path.join(self._home, "code", digest)
        there = os.path.isdir(folder)
        answer(event="output", there=there)
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
          arguments: of `pip install`.
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
            answer(event="output", line=line.decode("utf-8", "replace").rstrip("\n"))
    return popen.wait()


def write_all(data):
    """Write all of it to standard output."""
    while data:
        data = data[os.write(1, data) :]


def answer(**message):
    """Send the controller a message."""
    write_all(json.dumps(message).encode() + b"\n")
