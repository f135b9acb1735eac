"""An agent whose owners come and go, at a socket: the real one, and the test as its owners."""

from __future__ import annotations

import base64
import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import rundir
from launch.agent import served
from launch.backends import host_plan
from tests.testing.agents import PATIENCE_SECONDS
from tests.testing.gangs import ROOT, wait_until

COUNTS = """
import os, sys, time
for number in range(int(sys.argv[1])):
    print("line", number, flush=True)
    time.sleep(0.01)
"""


class Visitor:
    """One connection to the agent."""

    def __init__(self, path: Path, token: str, heard: int = 0, **positions: int):
        self.events: list[dict[str, Any]] = []
        self.closed = False
        self._unread = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        owner = {"token": token, "host": "here"}
        logs = {process_id.removeprefix("p"): size for process_id, size in positions.items()}
        self.say(command="attach", owner=owner, heard=heard, logs=logs, echo=1.5)

    def say(self, **message: Any) -> None:
        self.say_all(message)

    def say_all(self, *messages: dict[str, Any]) -> None:
        """Say several things at once."""
        self._socket.sendall(b"".join(json.dumps(one).encode() + b"\n" for one in messages))

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """An event of a kind with these fields, waited for."""
        wanted = {"event": event, **fields}
        limit = time.monotonic() + PATIENCE_SECONDS
        while True:
            for one in self.events:
                if {name: one.get(name) for name in wanted} == wanted:
                    return one
            assert time.monotonic() < limit, (event, self.events)
            self.hear(0.05)

    def hear(self, seconds: float) -> None:
        if select.select([self._socket], [], [], seconds)[0]:
            data = self._socket.recv(1 << 16)
            self.closed |= not data
            *lines, self._unread = (self._unread + data).split(b"\n")
            self.events += [json.loads(line) for line in lines]

    def log(self, process_id: int = 0) -> bytes:
        """What has come of a process's log, which must be without gaps."""
        data, first = b"", None
        for one in self.events:
            if one["event"] == "log" and one["process_id"] == process_id:
                first = one["offset"] if first is None else first
                assert one["offset"] == first + len(data)
                data += base64.b64decode(one["data"])
        return data

    def leave(self) -> None:
        self._socket.close()


class Agent:
    """An agent at a socket."""

    def __init__(self, folder: Path):
        self.path = folder / "s"
        self.attempt = folder / "attempt"
        code = "import sys; sys.path.insert(0, sys.argv[1]); "
        code += "from launch.agent.served import main; main(sys.argv[2:])"
        argv = [sys.executable, "-I", "-S", "-c", code, str(ROOT), str(self.path), "30"]
        self.popen = subprocess.Popen(argv, start_new_session=True)
        wait_until(self.path.exists, "the socket")

    def plan(self, *programs: list[str], **fields: Any) -> dict[str, Any]:
        return {
            "schema": 1,
            "host": "here",
            "lease_seconds": 60.0,
            "max_grace_seconds": 1.0,
            "max_log_bytes": 1 << 26,
            "hook": str(host_plan.HOOK_DIRECTORY),
            "folder": str(self.attempt),
            "cwd": "/",
            "files": {str(self.attempt / "config.py"): "x = 1\n"},
            "unattended_seconds": 60.0,
            "idle_seconds": 30.0,
            "processes": [
                {
                    **host_plan.files_of(self.attempt, process_id),
                    "process_id": process_id,
                    "argv": [sys.executable, "-c", *program],
                    "env": {},
                }
                for process_id, program in enumerate(programs)
            ],
            **fields,
        }


@pytest.fixture
def agent(tmp_path):
    agent = Agent(tmp_path)
    yield agent
    agent.popen.kill()
    agent.popen.wait()


def test_an_owner_that_comes_back_hears_what_it_has_missed_and_gets_the_rest_of_the_log(agent):
    first = Visitor(agent.path, "mine")
    assert first.wait_for("attached") | {"time": 0} == {
        "event": "attached", "time": 0, "echo": 1.5, "plan": False, "obeyed": 0,
    }  # fmt: skip
    first.say(command="plan", plan=agent.plan([COUNTS, "300"]), n=1)
    assert first.wait_for("started", process_id=0)["seq"] == 1
    wait_until(lambda: first.hear(0.05) or b"line 20\n" in first.log(), "some lines")
    first.leave()
    wait_until(lambda: rundir.exit_path(agent.attempt, 0).exists(), "the process's end")
    again = Visitor(agent.path, "mine", heard=1, p0=len(first.log()))
    assert again.wait_for("attached")["plan"]
    assert again.wait_for("exited", process_id=0)["seq"] == 2
    again.wait_for("done")
    assert not any(one["event"] == "started" for one in again.events), "it was heard"
    lines = (first.log() + again.log()).decode().splitlines()
    assert lines == [f"line {number}" for number in range(300)]
    names = {one["name"] for one in again.events if one["event"] == "file"}
    assert "process-00000.exit.json" in names
    assert agent.popen.poll() is None, "it waits until its end was heard"
    again.say(command="bye")
    assert agent.popen.wait(PATIENCE_SECONDS) == 0
    assert (agent.attempt / "config.py").read_text() == "x = 1\n"
    assert not agent.path.exists()


def test_a_second_owner_is_refused_as_long_as_the_first_is_heard(agent):
    first = Visitor(agent.path, "mine")
    first.say(command="plan", plan=agent.plan([COUNTS, "1000"]), n=1)
    first.wait_for("started")
    other = Visitor(agent.path, "another's")
    assert other.wait_for("refused")["owner"]["token"] == "mine"
    first.say(command="lease", echo=7)
    assert first.wait_for("pulse", echo=7)
    first.leave()
    taken = Visitor(agent.path, "another's")
    assert taken.wait_for("attached")["plan"]
    assert taken.wait_for("started")["seq"] == 1


def test_a_command_is_carried_out_once(agent):
    counts = "import signal, time\nn = []\n"
    counts += "signal.signal(15, lambda *_: (n.append(1), print('told', len(n), flush=True)))\n"
    counts += "print('ready', flush=True)\nwhile True: time.sleep(0.1)"
    first = Visitor(agent.path, "mine")
    first.say(command="plan", plan=agent.plan([counts]), n=1)
    wait_until(lambda: first.hear(0.05) or b"ready" in first.log(), "the process")
    first.say(command="stop", n=2)
    wait_until(lambda: first.hear(0.05) or b"told 1" in first.log(), "the signal")
    first.leave()
    again = Visitor(agent.path, "mine", p0=len(first.log()))
    assert again.wait_for("attached")["obeyed"] == 2
    again.say(command="stop", n=2)
    again.say(command="stop", n=3)
    wait_until(lambda: again.hear(0.05) or b"told" in again.log(), "the next signal")
    time.sleep(0.2)
    again.hear(0.1)
    assert again.log() == b"told 2\n"
    again.say(command="kill", n=4)
    assert again.wait_for("exited")["record"]["signal"] == 9


def test_what_comes_together_with_the_plan_is_carried_out(agent):
    first = Visitor(agent.path, "mine")
    plan = {"command": "plan", "plan": agent.plan([COUNTS, "100000"]), "n": 1}
    first.say_all(plan, {"command": "lease", "echo": 3}, {"command": "kill", "n": 2})
    assert first.wait_for("pulse", echo=3)
    assert first.wait_for("exited")["record"]["signal"] == 9


def test_without_an_owner_it_goes_on_until_the_deadline_and_not_longer(agent):
    first = Visitor(agent.path, "mine")
    plan = agent.plan([COUNTS, "100000"], lease_seconds=1.0, unattended_seconds=4.0, idle_seconds=1)
    began = time.monotonic()
    first.say(command="plan", plan=plan, n=1)
    pid = first.wait_for("started")["pid"]
    first.leave()
    time.sleep(2.0)  # Twice its lease.
    os.kill(pid, 0)
    assert agent.popen.wait(PATIENCE_SECONDS) == 0
    assert time.monotonic() - began > 3.5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_its_socket_is_found_only_when_it_can_be_connected_to(monkeypatch, tmp_path):
    path = str(tmp_path / "socket")
    found = []

    class Watched(socket.socket):
        def listen(self, *arguments):
            found.append(os.path.exists(path))
            super().listen(*arguments)

    monkeypatch.setattr(served.socket, "socket", Watched)
    owner = served.Served(path)
    assert found == [False]
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(path)
    assert [os.path.basename(one) for one in os.listdir(tmp_path)] == ["socket"]
    assert owner.plan is None


def test_an_agent_that_nobody_wants_does_not_wait_for_ever(tmp_path):
    path = tmp_path / "s"
    code = f"from launch.agent.served import main; main(['{path}', '0.5'])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=20)
    assert not path.exists()


def test_a_slow_listener_gets_all_of_a_large_log(agent):
    first = Visitor(agent.path, "mine")
    first.say(command="plan", plan=agent.plan(["print('x' * 99, end='\\n' * 1); "
              "import sys; sys.stdout.write(('y' * 99 + '\\n') * 50000)"]), n=1)  # fmt: skip
    rundir_log = rundir.log_path(agent.attempt, 0)
    wait_until(lambda: rundir.exit_path(agent.attempt, 0).exists(), "its end")
    first.wait_for("done")
    assert first.log() == rundir_log.read_bytes()
    assert len(first.log()) == 100 * 50001
