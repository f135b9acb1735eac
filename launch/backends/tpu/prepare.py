"""Bringing code and environment to every host at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.agent.cloud import METADATA_HOST
from launch.backends.tpu import plans
from launch.backends.tpu.code import Code
from launch.backends.tpu.plans import Prepared
from launch.backends.tpu.reach import Host, SshError, summary, tried
from launch.backends.tpu.ssh import HostFailedError, Session
from launch.spec import Cluster, ConfigError

HOST_PYTHON = "python3"  # Is on every TPU VM's image; runs agents, and sets up what the rest needs.
_SET_UP_SECONDS = 3600.0  # How long a command of set-up may print nothing.
_SHOWN_LINES = 15
_STORAGE_API = "https://storage.googleapis.com/"
_SETTINGS = ("setup.py", "setup.cfg", "pyproject.toml")  # Say what a package of the tree needs.


class LostError(Exception):
    """Hosts are not there any more; the message says which."""


class UnreachedError(LostError):
    """Hosts are not reached, though nothing says that they are gone."""


class Hosts:
    """All hosts of a run, worked on side by side."""

    def __init__(
        self,
        hosts: Sequence[Host],
        run_id: str,
        limit_seconds: float,
        say: Callable[[str], None],
        watch: Callable[[], None],
    ):
        """Takes the hosts.

        Args:
          hosts: all of them, in order.
          run_id: the run's.
          limit_seconds: how long one may be out of reach.
          say: tells the user a line.
          watch: called now and then; raises to have all of it end.
        """
        self.hosts = tuple(hosts)
        self._run_id = run_id
        self._limit = limit_seconds
        self._say = say
        self._watch = watch
        self._sessions: dict[str, Session] = {}
        self._over = threading.Event()

    def hello(self) -> dict[str, dict[str, Any]]:
        """What each host says of itself, by its name."""
        return self._everywhere(lambda session: session.call("hello", run=self._run_id))

    def prepare(
        self, cluster: Cluster, code: Code, keep: int | None, folder: Path
    ) -> tuple[Prepared, ...]:
        """Bring everything that an attempt needs.

        Args:
          cluster: says what.
          code: what goes to the hosts.
          keep: an attempt whose agents live on; those of others are ended.
          folder: where the output of set-up is kept, a file for each host.

        Raises:
          LostError: a host cannot be reached.
          ConfigError: set-up fails.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        work = _Work(cluster, code, self._run_id, keep, folder)
        found = self._everywhere(work.do)
        sent = sum(one["sent"] for one in found.values())
        ran = sum(one["ran"] for one in found.values())
        if sent or ran:
            number = len(self.hosts)
            ready = "one host is ready" if number == 1 else f"{number} hosts are ready"
            self._say(f"muster: {ready}: {sent >> 10} KiB of code sent, set-up run on {ran}")
        return tuple(found[host.name]["prepared"] for host in self.hosts)

    def port(self) -> int:
        """A port that is free on the first host."""
        return int(self._in_session(self.hosts[0], lambda s: s.call("port"), 15.0)["port"])

    def take(self, name: str) -> Session | None:
        """A connection that is open to a host, to be used for something else from now on."""
        return self._sessions.pop(name, None)

    def close(self) -> None:
        """End all connections."""
        self._over.set()
        for session in list(self._sessions.values()):
            session.close()
        self._sessions = {}

    def _everywhere(self, work: Callable[[Session], dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Do something on every host; waits until all are through, or one cannot be helped."""
        found: dict[str, dict[str, Any]] = {}
        lost: dict[str, str] = {}
        failed: dict[str, str] = {}

        def one(host: Host) -> None:
            try:
                found[host.name] = self._in_session(host, work, self._limit)
            except SshError as error:
                lost[host.name] = str(error)
            except HostFailedError as error:
                failed[host.name] = str(error)

        threads = [threading.Thread(target=one, args=(host,), daemon=True) for host in self.hosts]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads) and not (failed or lost):
                self._watch()
                time.sleep(0.05)
        except BaseException:
            self.close()
            raise
        if failed:
            raise ConfigError("", f"hosts cannot be set up: {summary(failed)}")
        if lost:
            raise UnreachedError(f"hosts are not reached: {summary(lost)}")
        return found

    def _in_session(
        self, host: Host, work: Callable[[Session], dict[str, Any]], limit: float
    ) -> dict[str, Any]:
        def attempt() -> dict[str, Any]:
            if self._over.is_set():
                raise HostFailedError("given up")
            session = self._sessions.get(host.name)
            if session is None:
                session = self._sessions[host.name] = Session(host, HOST_PYTHON)
            try:
                return work(session)
            except SshError:
                self._sessions.pop(host.name, None)
                session.close()
                raise

        told: set[str] = set()

        def say_once(text: str) -> None:
            key = text.partition("; trying")[0]
            if key not in told:
                told.add(key)
                self._say(text)

        return dict(tried(attempt, limit, time.sleep, say_once, host.name))


@dataclasses.dataclass(frozen=True)
class _Work:
    """Everything that is done on one host."""

    cluster: Cluster
    code: Code
    run_id: str
    keep: int | None
    folder: Path

    def do(self, session: Session) -> dict[str, Any]:
        """Do it; what there is is left as it is."""
        spec, host = self.cluster.tpu, session.host
        hello = session.call("hello", run=self.run_id)
        session.call("clear", run=self.run_id, keep=self.keep)
        if spec.storage is not None and host.slice == host.worker == 0:
            try_storage(session, self.cluster)
        folders, sent = [], 0
        for archive in self.code.archives:
            done = session.call(
                "code",
                digest=archive.digest,
                size=archive.size,
                payload=archive.path,
                timeout_seconds=_SET_UP_SECONDS,
            )
            folders.append(done["folder"])
            sent += done["sent"]
        cwd = (
            os.path.join(folders[0], self.code.cwd)
            if self.code.root
            else os.path.dirname(hello["home"])
        )
        path: tuple[str, ...] = ()
        python = spec.python if spec.container is None else spec.container_python
        ran = False
        if spec.packages:
            made = self._call(session, "environment", key=self._environment_key(),
                              python=spec.python, arguments=self._pip(), cwd=cwd)  # fmt: skip
            path, python = (made["bin"],), os.path.join(made["bin"], "python")
            ran |= made["ran"]
        if self.cluster.setup:
            paths = os.pathsep.join([*path, "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"])
            env = {**self.cluster.env, "PATH": paths}
            made = self._call(session, "set_up", key=self._set_up_key(), cwd=cwd, env=env,
                              commands=list(self.cluster.setup))  # fmt: skip
            ran |= made["ran"]
        # The user's own code first.
        python_path = tuple(dict.fromkeys([*([cwd] if self.code.root else []), *folders]))
        prepared = Prepared(host, hello["home"], cwd, python, path, python_path)
        return {"prepared": prepared, "sent": sent, "ran": ran}

    def _call(self, session: Session, command: str, **arguments: Any) -> dict[str, Any]:
        """A command whose output is kept, and shown at its end if it fails."""
        lines: list[str] = []
        file = self.folder / f"{session.host.name}.log"
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as log:

            def said(line: str) -> None:
                lines.append(line)
                log.write(line + "\n")
                log.flush()

            try:
                return session.call(
                    command, timeout_seconds=_SET_UP_SECONDS, said=said, **arguments
                )
            except HostFailedError as error:
                shown = "".join(f"\n    {line}" for line in lines[-_SHOWN_LINES:])
                text = f"{error}; all of its output is in {file}, the last lines are:{shown}"
                raise HostFailedError(text) from None

    def _pip(self) -> list[str]:
        spec = self.cluster.tpu
        pins = [] if spec.constraints is None else ["--constraint", spec.constraints]
        return [*pins, *spec.packages]

    def _environment_key(self) -> str:
        words = [self.cluster.tpu.python, *self._pip()]
        settings = _SETTINGS if any(word.startswith(".") for word in words) else ()
        return _key(words, [*words, *settings])

    def _set_up_key(self) -> str:
        words = [word for command in self.cluster.setup for word in _words(command)]
        environment = self._environment_key() if self.cluster.tpu.packages else ""
        return _key([*self.cluster.setup, environment], words)


def try_storage(session: Session, cluster: Cluster) -> None:
    """See that what lasts can be written from a host.

    Raises:
      HostFailedError: it cannot.
    """
    metadata = cluster.env.get(METADATA_HOST, plans.METADATA)
    api = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE", _STORAGE_API)
    try:
        session.call("storage", place=cluster.tpu.storage, metadata=metadata, api=api)
    except HostFailedError as error:
        advice = "give the machines' service account roles/storage.objectAdmin on the bucket"
        if not str(cluster.tpu.storage).startswith("gs://"):
            advice = "it must be a directory that all hosts see, or gs://BUCKET/DIRECTORY"
        raise HostFailedError(f"tpu.storage: {error}; {advice}") from None


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _key(words: Sequence[str], names: Sequence[str]) -> str:
    """What stands for commands and for the content of the files that they name."""
    digest = hashlib.sha256(json.dumps(list(words)).encode())
    for name in names:
        path = Path(name)
        if path.is_file():
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def alive_attempts(hello: Mapping[str, Mapping[str, Any]]) -> set[int]:
    """The attempts of which any host has an agent that lives."""
    return {number for one in hello.values() for number in one["agents"]}
