"""The agent: real processes at its one end, the test as the owner at the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import rundir
from launch.agent import log as agent_log
from launch.agent.log import Log
from tests.testing.agents import alive, owner

SLEEP = "import time; print('ready'); time.sleep(600)"
# Ignores SIGTERM, as does its child, which it names.
STUBBORN = """
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    print("child", child.pid, "ready")
    time.sleep(600)
"""


def child_of(agent) -> int:
    return int(rundir.log_path(agent.folder, 0).read_text().split()[1])


def test_every_process_gets_a_record_of_its_end(tmp_path):
    programs = ["print('one')", "raise SystemExit(3)", "import os; os.kill(os.getpid(), 11)"]
    with owner(tmp_path, *programs, ["no-such-program"]) as agent:
        first, second, third, fourth = agent.end()
        assert (first["exit_code"], first["signal"], first["last_lines"]) == (0, None, ["one"])
        assert (second["exit_code"], third["signal"]) == (3, signal.SIGSEGV)
        assert fourth["not_started"] == "no-such-program: No such file or directory"
        assert all(record["told_at"] is None for record in (first, second, third))
        assert first["started_at"] <= first["ended_at"]
        said = agent.wait_for("exited", process_id=1)["record"]
        assert said == second
        assert oct(rundir.exit_path(tmp_path, 0).stat().st_mode)[-3:] == "600"


def test_an_exception_is_told_before_the_process_ends_and_recorded_with_its_traceback(tmp_path):
    program = """
        import atexit, time
        from launch.contract import report_progress
        report_progress(7, "data")
        def leave():
            print(open(__import__("os").environ["MUSTER_PROGRESS_FILE"]).read().strip())
            time.sleep(600)
        atexit.register(leave)
        raise ValueError("bad row")
    """
    with owner(tmp_path, program) as agent:
        failure = agent.wait_for("raised")["failure"]
        assert (failure["type"], failure["message"]) == ("ValueError", "bad row")
        assert "in <module>" in failure["traceback"]
        agent.wait_for_log('"exit"')  # Said before the handlers of atexit run.
        agent.tell("kill")
        (record,) = agent.end()
        assert record["exception"] == failure
        assert (record["step"], record["phase"]) == (7, "exit")
        assert record["told_at"] is not None
        assert agent.wait_for("exited")["told_at"] <= agent.wait_for("exited")["time"]


def test_an_exception_is_told_also_where_its_record_cannot_be_written(tmp_path):
    program = """
        import atexit, os, time
        from launch.contract import report_progress
        os.environ["MUSTER_FAILURE_FILE"] = "/no/such/folder/failure.json"
        report_progress(7, "data")
        atexit.register(time.sleep, 600)
        raise OSError(28, "No space left on device")
    """
    with owner(tmp_path, program) as agent:
        failure = agent.wait_for("raised")["failure"]
        assert (failure["type"], failure["message"]) == (
            "OSError",
            "[Errno 28] No space left on device",
        )
        agent.tell("kill")
        (record,) = agent.end()
        assert (record["exception"], record["phase"]) == (failure, "exit")


def test_progress_is_told_once_with_the_time_of_its_change(tmp_path):
    program = """
        import time
        from launch.contract import report_progress
        for step in range(3):
            report_progress(step, "step")
        print("ready")
        time.sleep(600)
    """
    with owner(tmp_path, program) as agent:
        agent.wait_for_log("ready")
        time.sleep(0.25)
        before = time.monotonic()
        agent.tell("lease", echo=1)
        ((process_id, step, phase, changed_at),) = agent.wait_for("pulse", echo=1)["progress"]
        assert (process_id, step, phase) == (0, 2, "step")
        assert changed_at < before
        agent.tell("lease", echo=2)
        assert agent.wait_for("pulse", echo=2)["progress"] == []


def test_half_of_a_report_and_what_is_none_is_not_taken_for_one(tmp_path):
    program = """
        import os, time
        with open(os.environ["MUSTER_PROGRESS_FILE"], "w") as file:
            for text in ('{"step": 1, "phase": "st', '{"step": "x", "phase": "step"}', "[1]"):
                file.seek(0)
                file.truncate()
                file.write(text)
                file.flush()
                time.sleep(0.15)
            file.seek(0)
            file.truncate()
            file.write('{"step": 4, "phase": "mine"}')
    """
    with owner(tmp_path, program) as agent:
        (record,) = agent.end()
        assert (record["exit_code"], record["step"], record["phase"]) == (0, 4, "exit")


def test_what_ignores_sigterm_is_gone_with_its_children_when_the_lease_is_over(tmp_path):
    with owner(tmp_path, STUBBORN, lease_seconds=2.0) as agent:
        agent.wait_for_log("ready")
        child = child_of(agent)
        for echo in range(5):  # Kept up for longer than one lease lasts.
            agent.tell("lease", echo=echo)
            agent.wait_for("pulse", echo=echo)
            time.sleep(0.5)
        assert alive(child)
        answered_at = agent.wait_for("pulse", echo=4)["time"]
        (record,) = agent.end()
        assert record["signal"] == signal.SIGKILL
        assert record["told_at"] is not None
        assert agent.wait_for("exited")["time"] < answered_at + 2.5 + 0.5
        assert not alive(child)


def test_a_lease_that_comes_together_with_the_plan_is_answered(tmp_path):
    with owner(tmp_path, SLEEP, behind={"command": "lease", "echo": 5}) as agent:
        assert agent.wait_for("pulse", echo=5)
        agent.tell("kill")
        agent.end()


def test_an_agent_that_loses_its_owner_stops_everything_at_once(tmp_path):
    with owner(tmp_path, STUBBORN) as agent:
        agent.wait_for_log("ready")
        child = child_of(agent)
        agent.popen.stdin.close()
        agent.popen.wait(timeout=20)
        assert not alive(child)
        assert rundir.read_record(rundir.exit_path(tmp_path, 0))["signal"] == signal.SIGKILL


def test_an_agent_that_was_suspended_beyond_its_lease_does_not_go_on(tmp_path):
    with owner(tmp_path, SLEEP, lease_seconds=1.0) as agent:
        agent.wait_for_log("ready")
        os.kill(agent.popen.pid, signal.SIGSTOP)
        for echo in range(3):
            agent.tell("lease", echo=echo)
        time.sleep(1.2)
        os.kill(agent.popen.pid, signal.SIGCONT)
        (record,) = agent.end()
        assert record["told_at"] is not None


def test_an_owner_that_does_not_listen_does_not_keep_the_agent_from_its_end(tmp_path):
    chatty = "print('x' * 400 + '\\n' * 1, end='')\n"
    programs = [f"for _ in range(100): {chatty}"] * 4 + [SLEEP]
    with owner(tmp_path, *programs, lease_seconds=1.5) as agent:
        # Nothing is read here, and the records fill the pipe.
        assert agent.popen.stdout is not None
        sleeper = rundir.exit_path(tmp_path, 4)
        limit = time.monotonic() + 20
        while not sleeper.exists() and time.monotonic() < limit:
            time.sleep(0.05)
        assert rundir.read_record(sleeper)["told_at"] is not None


STACKS = {
    "holds the interpreter in C": (
        "import re\ndef spin():\n    re.match('(a+)+$', 'a' * 80 + 'b')\nspin()",
        "in spin",
        "R",
    ),
    "sleeps": ("import time\ndef nap():\n    time.sleep(600)\nnap()", "in nap", "S"),
    "is stopped": ("import os\nos.kill(os.getpid(), 19)", "", "T"),
    "is not Python": (["sleep", "600"], "", "S"),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_are_taken_without_the_processes_help(name, tmp_path):
    program, text, state = STACKS[name]
    with owner(tmp_path, program) as agent:
        agent.wait_for("started")
        pid = agent.wait_for("started")["pid"]
        stacks = rundir.stacks_path(tmp_path, 0)
        if text:
            agent.wait_until(stacks.exists, "the hook")
        time.sleep(0.3)
        for count in (1, 2):
            agent.tell("stacks")
            taken = agent.wait_for("stacks", count)
            assert taken["state"] == state
            assert (text in taken["text"]) if text else taken["text"] == ""
        assert stacks.read_text().count("--- asked at") == 2
        assert alive(pid)


def test_stacks_that_nobody_asked_for_leave_no_file(tmp_path):
    with owner(tmp_path, "print(1)") as agent:
        agent.end()
        assert list((tmp_path / "stacks").iterdir()) == []


def test_the_memory_of_a_process_is_told(tmp_path):
    with owner(tmp_path, "x = b'x' * (200 << 20)", "pass") as agent:
        large, small = agent.end()
        assert 200 << 20 < large["peak_memory_bytes"] < 400 << 20
        assert small["peak_memory_bytes"] < 100 << 20


@pytest.fixture
def small_cgroup():
    """A cgroup that allows 64 MiB."""
    for base, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup", base, f"muster-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(64 << 20))
        except OSError:
            group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("needs a cgroup of its own whose memory it may limit")


def test_a_process_that_the_kernel_ends_for_want_of_memory_is_told_apart(tmp_path, small_cgroup):
    enter = f"open('{small_cgroup}/cgroup.procs', 'w').write(str(__import__('os').getpid()))\n"
    eats = (
        enter + "import time; time.sleep(0.3); kept = []\nwhile True: kept.append(b'x' * (1 << 20))"
    )
    killed = "import os; os.kill(os.getpid(), 9)"
    with owner(tmp_path, eats, killed, "b'x' * (1 << 60)") as agent:
        first, second, third = agent.end()
        assert (first["signal"], first["oom_killed"]) == (signal.SIGKILL, True)
        assert (second["signal"], second["oom_killed"]) == (signal.SIGKILL, False)
        assert (third["exception"]["type"], third["oom_killed"]) == ("MemoryError", False)


def test_a_record_that_cannot_be_written_is_told_all_the_same(tmp_path):
    with owner(tmp_path, SLEEP) as agent:
        agent.wait_for_log("ready")
        rundir.exit_path(tmp_path, 0).mkdir()
        agent.tell("stop")
        assert agent.wait_for("exited")["record"]["signal"] == signal.SIGTERM
        agent.wait_for("done")


# ---------------------------------------------------------------------- logs

WRITER = "import sys\nfor i in range(300_000): sys.stdout.write('%09d\\n' % i)"


def whole(log: Log) -> tuple[bytes, bytes, int]:
    """The beginning and the end that are kept, and how many bytes are missing between them."""
    parts = sorted(
        (int(path.name.rpartition(".")[2]), path) for path in Path(log.path).parent.glob("log.*")
    )
    if not parts:
        return b"", Path(log.path).read_bytes(), 0
    head = parts[0][1].read_bytes()
    if len(parts) == 1:
        return head, Path(log.path).read_bytes(), 0
    (_, first), (start, second) = parts
    tail = second.read_bytes() + Path(log.path).read_bytes()
    return head, tail, start - len(first.read_bytes())


@pytest.mark.parametrize("collapses", [True, False])
def test_a_log_keeps_its_beginning_and_its_end_while_it_is_written(
    collapses, tmp_path, monkeypatch
):
    if not collapses:
        monkeypatch.setattr(agent_log, "_collapse", lambda fd, length: False)
    log = Log(str(tmp_path / "log"), 300_000)
    writer = subprocess.Popen([sys.executable, "-u", "-c", WRITER], stdout=log.fd)
    while writer.poll() is None:
        log.trim()
    log.trim()
    head, tail, missing = whole(log)
    assert log.dropped == missing
    assert head == b"".join(b"%09d\n" % i for i in range(len(head) // 10 + 1))[: len(head)]
    assert 90_000 < len(head) <= 150_000
    assert tail.endswith(b"%09d\n" % 299_999)
    assert len(head) + len(tail) < 500_000
    if collapses:
        total = len(head) + missing + len(tail)
        if total != 3_000_000:
            pytest.skip("this file system cannot cut a file in front: some bytes are lost")
        numbers = [int(line) for line in tail[-(len(tail) // 10) * 10 :].split()]
        assert numbers == list(range(numbers[0], 300_000))
    log.close()


def test_binary_junk_and_an_endless_line_are_kept_as_they_are(tmp_path):
    log = Log(str(tmp_path / "log"), 300_000)
    junk = bytes(range(256)) * 4000
    os.write(log.fd, junk)
    log.trim()
    head, tail, missing = whole(log)
    assert head + junk[len(head) : len(head) + missing] + tail == junk
    assert missing == log.dropped > 0
    assert all(len(line) <= 500 for line in log.last_lines())
    log.close()


def test_the_stacks_of_an_abort_do_not_hide_what_was_said_before(tmp_path):
    log = Log(str(tmp_path / "log"), 1 << 20)
    frames = [f'  File "/x.py", line {i} in f' for i in range(100)]
    os.write(log.fd, "\n".join(["F1129 the reason", "Fatal Python error: Aborted", ""]).encode())
    os.write(log.fd, "\n".join(["Thread 0x00007f (most recent call first):", *frames]).encode())
    os.write(log.fd, b"\n\nExtension modules: numpy (total: 1)\nsaid later\n  File kept\n")
    expected = ["F1129 the reason", "Fatal Python error: Aborted", "said later", "  File kept"]
    assert log.last_lines() == expected


def test_the_last_lines_are_found_across_a_cut(tmp_path):
    log = Log(str(tmp_path / "log"), 30_000)
    os.write(log.fd, b"".join(b"line %d\n" % i for i in range(2000)))
    log.trim()
    assert log.last_lines() == [f"line {i}" for i in range(1920, 2000)]
    log.close()


def test_who_decides_over_the_machine_may_tell_everybody_and_it_is_no_failure(tmp_path):
    with owner(tmp_path, SLEEP, SLEEP, lease_seconds=60.0, tells_signals=True) as agent:
        pids = [agent.wait_for("started", process_id=i)["pid"] for i in (0, 1)]
        for process_id in (0, 1):
            agent.wait_for_log("ready", process_id)
        os.kill(pids[1], signal.SIGTERM)  # It hears first, and dies of it.
        os.kill(agent.popen.pid, signal.SIGTERM)
        agent.wait_for("signalled")
        records = agent.end()
        assert [record["signal"] for record in records] == [signal.SIGTERM] * 2
        assert all(record["told_at"] for record in records)


def test_a_process_that_somebody_terminates_alone_was_not_told_by_us(tmp_path):
    with owner(tmp_path, SLEEP, tells_signals=True) as agent:
        agent.wait_for_log("ready")
        os.kill(agent.wait_for("started")["pid"], signal.SIGTERM)
        (record,) = agent.end()
        assert (record["signal"], record["told_at"]) == (signal.SIGTERM, None)
        assert not any(event["event"] == "signalled" for event in agent.events)
