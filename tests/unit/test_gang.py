"""What the controller believes of its agents: their clocks and their leases."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from launch.agent_link import AgentClock, AgentLink
from launch.channel import LocalChannel

LEASE = 10.0


def test_a_clock_an_hour_off_is_converted_by_the_quickest_exchange():
    clock = AgentClock()
    assert clock.ours(5000.0, received=7.0) == 7.0  # Nothing known yet: it happened just now.
    clock.learn(sent=10.0, theirs=3611.9, received=12.0)
    clock.learn(sent=20.0, theirs=3620.05, received=20.1)
    clock.learn(sent=30.0, theirs=3639.0, received=40.0)
    assert clock.ours(3650.0, received=60.0) == pytest.approx(50.0, abs=0.06)


def test_nothing_is_dated_after_it_was_heard():
    clock = AgentClock()
    clock.learn(sent=0.0, theirs=100.0, received=2.0)
    assert clock.ours(104.0, received=4.5) == 4.5


@pytest.fixture
def link():
    """A link to an agent that says what the test tells it to."""
    read_end, write_end = os.pipe()
    popen = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    popen.stdout.close()
    popen.stdout = os.fdopen(read_end, "rb", buffering=0)
    made = AgentLink(LocalChannel("h0", popen), LEASE, now=0.0)
    made.say_bytes = lambda data: os.write(write_end, data)
    made.say = lambda **message: made.say_bytes(json.dumps(message).encode() + b"\n")
    yield made
    os.close(write_end)
    made.end(others=[])


def test_the_next_lease_waits_for_the_answer_to_the_last_one(link):
    assert link.renew(0.0)
    assert link.renew(LEASE)  # Not answered yet: no other is sent, whose time would start anew.
    link.say(event="pulse", echo=0.0, time=0.1, progress=[])
    link.read(LEASE + 0.5)
    assert link.renew(LEASE + 0.5)
    assert link.renew(2 * LEASE + 0.5)
    assert not link.renew(2 * LEASE + 1.6)


def test_an_agent_that_never_answers_is_given_up_after_one_lease(link):
    assert link.renew(5.0)
    assert link.renew(5.0 + LEASE)
    assert not link.renew(5.0 + LEASE + 1.0)


def test_half_a_message_waits_for_the_rest(link):
    line = json.dumps({"event": "done", "leftover": []}).encode() + b"\n"
    link.say_bytes(line[:5])
    assert link.read(1.0) == []
    link.say_bytes(line[5:])
    assert link.read(1.0) == [{"event": "done", "leftover": []}]
