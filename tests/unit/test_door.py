"""Agents of other machines come in by a key, and nobody else does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.agent import connect
from launch.backends import host_plan
from launch.backends.slurm.door import Door
from launch.channel import RemoteChannel

PATIENCE_SECONDS = 20.0
LOOPBACK = "127.0.0.1"


@pytest.fixture
def channels():
    made = {host: RemoteChannel(host) for host in ("n1", "n2")}
    yield made
    for channel in made.values():
        channel.end(done=True, others=[])


@pytest.fixture
def door(tmp_path: Path, channels):
    opened = Door(LOOPBACK, tmp_path / "door.json", channels)
    yield tmp_path / "door.json"
    opened.close()


def wait_for(channel: RemoteChannel) -> None:
    limit = time.monotonic() + PATIENCE_SECONDS
    while channel.fd is None:
        assert time.monotonic() < limit, "nobody came"
        time.sleep(0.01)


def read_all(channel: RemoteChannel) -> list[dict]:
    """What an agent says until its end."""
    data = b""
    limit = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < limit:
        assert channel._socket is not None
        channel._socket.setblocking(True)
        more = channel.read()
        if not more:
            break
        data += more
    return [json.loads(line) for line in data.splitlines()]


def start_agent(door: Path, host: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        host_plan.agent_command(sys.executable, str(door), "MY_NODE"),
        env={"MY_NODE": host},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_a_real_agent_comes_in_and_carries_out_its_plan(door, channels, tmp_path):
    agent = start_agent(door, "n2")
    wait_for(channels["n2"])
    files = host_plan.files_of(tmp_path, 0)
    process = {**files, "process_id": 0, "argv": ["echo", "so it is"], "env": {}}
    plan = {
        "schema": 1,
        "host": "n2",
        "lease_seconds": 20.0,
        "max_grace_seconds": 1.0,
        "max_log_bytes": 1 << 20,
        "hook": None,
        "complaints": str(tmp_path / "complaints"),
        "processes": [process],
    }
    channels["n2"].write(json.dumps(plan).encode() + b"\n")
    events = read_all(channels["n2"])
    assert [event["event"] for event in events] == ["started", "exited", "done"]
    assert Path(files["log"]).read_text() == "so it is\n"
    assert agent.wait(PATIENCE_SECONDS) == 0
    assert channels["n1"].fd is None
    assert (tmp_path / "complaints").exists()


def test_the_file_that_tells_of_it_is_the_users_alone_and_goes_with_it(door, tmp_path, channels):
    assert door.stat().st_mode & 0o077 == 0
    other = Door(LOOPBACK, tmp_path / "other.json", channels)
    assert json.loads(door.read_text())["key"] != json.loads(other._path.read_text())["key"]
    other.close()
    assert not (tmp_path / "other.json").exists()


def test_an_agent_with_another_key_is_not_let_in_and_carries_out_nothing(door, channels, tmp_path):
    said = json.loads(door.read_text())
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({**said, "key": connect.new_key()}))
    agent = start_agent(wrong, "n1")
    _, err = agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode != 0
    assert b"is not the owner" in err
    time.sleep(0.2)
    assert channels["n1"].fd is None


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"nonce": 1}\n'])
def test_whoever_else_knocks_holds_nobody_up(said, door, channels):
    where = json.loads(door.read_text())
    with socket.create_connection((where["address"], where["port"])) as stranger:
        stranger.sendall(said)
        agent = start_agent(door, "n1")
        wait_for(channels["n1"])
        channels["n1"].close_input()
        assert agent.wait(PATIENCE_SECONDS) == 0  # Its owner left before it had a plan.
        agent.stderr.close()


def test_a_listener_that_has_not_the_key_gets_no_proof_of_it(tmp_path):
    """An agent that was led astray to another port says nothing by which anybody could come in."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        key = connect.new_key()
        where = {"address": LOOPBACK, "port": listener.getsockname()[1], "key": key}
        (tmp_path / "door.json").write_text(json.dumps(where))
        agent = start_agent(tmp_path / "door.json", "n1")
        connection, _ = listener.accept()
        hello = connect.receive(connection)
        connect.send(connection, nonce="x", proof=connect.proof(connect.new_key(), "owner", "", ""))
        assert connection.recv(4096) == b""
        assert "proof" not in hello
        connection.close()
        _, err = agent.communicate(timeout=PATIENCE_SECONDS)
        assert b"is not the owner" in err


def knock(where: dict, host: str, key: str, role: str = "agent") -> socket.socket:
    """Come to the door with a key."""
    connection = socket.create_connection((where["address"], where["port"]))
    mine = connect.nonce()
    connect.send(connection, host=host, nonce=mine)
    theirs = connect.receive(connection)["nonce"]
    connect.send(connection, proof=connect.proof(key, role, theirs, mine))
    connection.settimeout(PATIENCE_SECONDS)
    return connection


def test_who_knows_how_to_greet_and_has_not_the_key_is_not_let_in(door, channels):
    where = json.loads(door.read_text())
    for key, role in ((connect.new_key(), "agent"), (where["key"], "owner")):
        with knock(where, "n1", key, role) as stranger:
            assert stranger.recv(1) == b""
    assert channels["n1"].fd is None


def test_a_host_comes_once_and_an_unknown_one_never(door, channels):
    where = json.loads(door.read_text())
    first = knock(where, "n1", where["key"])
    wait_for(channels["n1"])
    for host in ("n1", "n9"):
        with knock(where, host, where["key"]) as other:
            assert other.recv(1) == b""
    channels["n1"].write(b"for the first\n")
    assert first.recv(64) == b"for the first\n"
    first.close()
