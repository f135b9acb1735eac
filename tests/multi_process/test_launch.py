"""The local backend with real processes and real signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import struct
import subprocess
import time
from concurrent import futures
from pathlib import Path

import pytest

from launch import rundir
from launch.backends import local
from tests.testing.gangs import MusterCommand, environment, wait_until

# Ignores SIGTERM, has a child in its own group and one that left the group for a new session.
STUBBORN = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep = [sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"]
    subprocess.Popen(sleep)
    subprocess.Popen(sleep, start_new_session=True)
    print("ready", flush=True)
    time.sleep(600)
"""

# Stops as a trainer does: saves, and exits with 75.
GRACEFUL = """
    import signal, sys, time
    def stop(*_):
        print("saved", flush=True)
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(600)
"""

JAX_GANG = """
    import jax
    jax.distributed.initialize()
    from jax.experimental import multihost_utils
    total = multihost_utils.process_allgather(jax.numpy.ones(())).sum()
    # Not printed: Gloo's threads write in the middle of such a line.
    counts = jax.process_count(), jax.device_count(), jax.local_device_count(), int(total)
    assert counts == (2, 6, 3, 2), counts
"""


@pytest.fixture
def muster(tmp_path: Path):
    command = MusterCommand(tmp_path, grace_seconds=60.0)
    yield command
    command.check_nothing_is_left()


def start_and_wait(muster: MusterCommand, program: str) -> subprocess.Popen[str]:
    process = muster.start(program=program)
    muster.wait_for_log("ready")
    return process


def test_two_gangs_of_programs_that_call_initialize_without_arguments_do_not_meet(tmp_path):
    gangs = []
    for name, hosts in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        cluster = {"hosts": hosts, "processes_per_host": 2 // hosts, "devices_per_process": 3}
        gangs.append(MusterCommand(tmp_path / name, **cluster))
    started = [gang.start(program=JAX_GANG) for gang in gangs]
    for gang, process in zip(gangs, started, strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert gang.left() == []


def test_the_coordinator_listens_on_the_reserved_port_of_the_loopback_interface_only(tmp_path):
    program = """
        import os, jax
        jax.distributed.initialize()
        port = int(os.environ["MUSTER_COORDINATOR_ADDRESS"].split(":")[1])
        tables = open("/proc/net/tcp").readlines() + open("/proc/net/tcp6").readlines()
        local = [row.split()[1] for row in tables if row.split()[3] == "0A"]  # listening
        print({name[-13:-5] for name in local if name.endswith(f":{port:04X}")})
    """
    muster = MusterCommand(tmp_path, processes_per_host=1)
    done = muster.run(program=program)
    assert done.stdout == "{'0100007F'}\n", done.stderr  # 127.0.0.1, also as seen through IPv6


@pytest.mark.parametrize("shares", [False, True])
def test_the_kernel_gives_a_reserved_port_to_nobody_who_asks_for_any(shares):
    with local.reserve_port() as reservation, socket.socket() as other:
        port = reservation.getsockname()[1]
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shares)
        ip_local_port_range = 51  # Choose among these ports, here the reserved one only.
        try:
            other.setsockopt(
                socket.IPPROTO_IP, ip_local_port_range, struct.pack("I", port << 16 | port)
            )
        except OSError:
            pytest.skip("needs Linux 6.3")
        with pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", 0))


def test_a_program_that_knows_nothing_of_jax_runs_and_its_records_are_written(muster):
    program = """
        import os, sys
        from launch.contract import report_progress
        me = os.environ["MUSTER_PROCESS_ID"]
        print("I am", me, "of", os.environ["MUSTER_NUM_PROCESSES"], *sys.argv[1:])
        report_progress(3)
        report_progress(7, "save", loss=0.5)
    """
    done = muster.run(program=program)
    assert (done.returncode, done.stdout) == (0, "I am 0 of 2\n"), done.stderr
    assert "I am 1 of 2" in muster.log(1)
    attempt = muster.attempt()
    assert (attempt["cause"], attempt["first_step"], attempt["last_step"]) == ("completed", 3, 7)
    assert (attempt["schema"], attempt["hosts"], attempt["guilty_process"]) == (1, ["local0"], None)
    record = rundir.exit_path(rundir.attempt_path(muster.workdir, 0), 1)
    ended = json.loads(record.read_text())
    assert (ended["process_id"], ended["exit_code"], ended["signal"]) == (1, 0, None)
    assert ended["progress"]["step"] == 7
    assert muster.run("--process=1", program=program).stdout == "I am 1 of 2\n"
    assert muster.attempt(1)["attempt"] == 1


def test_the_first_process_to_fail_stops_the_gang_and_is_named_without_the_noise_of_others(muster):
    program = STUBBORN.replace(
        'print("ready", flush=True)',
        """print("noise of process", os.environ["MUSTER_PROCESS_ID"], flush=True)
    if os.environ["MUSTER_PROCESS_ID"] == "1":
        time.sleep(0.2)
        raise ValueError("the real reason")""",
    )
    done = muster.run("--process=1", program=program)
    assert done.returncode == 1
    assert "process 1/2 on local0 failed" in done.stderr
    assert "ValueError: the real reason" in done.stderr
    assert str(rundir.log_path(rundir.attempt_path(muster.workdir, 0), 1)) in done.stderr
    assert "noise of process 0" not in done.stderr
    attempt = muster.attempt()
    assert (attempt["cause"], attempt["guilty_process"], attempt["guilty_host"]) == (
        "exception",
        1,
        "local0",
    )
    assert muster.left() == []


def test_a_process_killed_by_a_signal_is_named_with_the_signal(muster):
    program = """
        import os, signal, time
        if os.environ["MUSTER_PROCESS_ID"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    """
    done = muster.run(program=program)
    assert done.returncode == 1
    assert "process 1/2 on local0 was killed by SIGKILL" in done.stderr
    assert muster.attempt()["cause"] == "killed"


def test_a_program_that_finds_its_config_wrong_ends_with_one_line_and_code_2(muster):
    program = """
        import sys
        print("much else", file=sys.stderr)
        sys.exit("error: config.x=3: must be 4") if False else None
        print("error: config.x=3: must be 4", file=sys.stderr)
        sys.exit(2)
    """
    done = muster.run("--process=1", program=program)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == ["muster: error: config.x=3: must be 4"]
    assert muster.attempt()["cause"] == "config"


def test_a_program_that_is_not_there_is_named_with_code_2(muster):
    done = subprocess.run(
        [*muster.command(), "--", "no-such-program"],
        cwd=muster.folder,
        env=environment(),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no-such-program: No such file or directory" in done.stderr


def test_a_sigterm_to_the_launcher_stops_gracefully_and_the_run_is_resumable(muster):
    process = start_and_wait(muster, GRACEFUL)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert all("saved" in muster.log(i) for i in range(2))
    assert muster.attempt()["cause"] == "stopped"


def test_ctrl_c_on_a_terminal_reaches_the_program_as_one_request_to_stop(muster):
    program = """
        import signal, sys, time
        def stop(*_):
            print("saved", flush=True)
            sys.exit(75)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
        print("ready", flush=True)
        while True:
            time.sleep(600)
    """
    process = muster.start(program=program, process_group=0)
    muster.wait_for_log("ready")
    # The signal is the launcher's alone to pass on, with the user's grace period.
    assert os.getsid(muster.agents()[0]) != os.getsid(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does to all in the foreground.
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert [muster.log(i) for i in range(2)] == ["ready\nsaved\n"] * 2


def test_a_second_signal_kills_at_once_what_ignores_the_first(muster):
    process = start_and_wait(muster, STUBBORN)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "once more" in process.stderr.readline() or None, "the first to be heard")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)  # The grace period is 60 s.
    assert process.returncode == 75
    assert muster.left() == []


def test_all_processes_stopping_early_by_themselves_is_a_preemption(muster):
    process = start_and_wait(muster, GRACEFUL)
    for pid in set(muster.left()) - set(muster.agents()):
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert muster.attempt()["cause"] == "preempted"


def test_a_killed_launcher_leaves_nothing_and_the_next_run_says_what_became_of_it(muster):
    process = start_and_wait(muster, STUBBORN)
    assert len(muster.left()) > 6  # Two processes with two children each, and the agent.
    process.kill()
    process.communicate()
    again = muster.run(program="print('again')")
    assert "the launcher of this run was killed; waiting until" in again.stderr
    assert (again.returncode, again.stdout) == (0, "again\n")
    assert (muster.attempt(0)["cause"], muster.attempt(1)["cause"]) == ("killed", "completed")


def test_a_killed_agent_leaves_nothing_and_its_host_is_named(tmp_path):
    muster = MusterCommand(tmp_path, hosts=2, processes_per_host=1)
    process = start_and_wait(muster, STUBBORN)
    os.kill(muster.agent_of("local1"), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "host local1 was lost" in err
    assert (muster.attempt()["cause"], muster.attempt()["guilty_host"]) == ("host_lost", "local1")
    assert muster.left() == []


def test_processes_die_even_when_launcher_and_agent_are_killed_at_once(muster):
    program = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(600)
    """
    process = start_and_wait(muster, program)
    agent = muster.agents()[0]
    os.kill(agent, signal.SIGSTOP)  # So that it cannot clean up in between.
    process.kill()
    os.kill(agent, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not muster.left(), "the processes to be gone", seconds=10)


def test_a_reader_of_the_output_who_leaves_does_not_stop_the_run(muster):
    program = """
        import time
        for number in range(20):
            print("line", number, flush=True)
            time.sleep(0.02)
    """
    process = muster.start(program=program)
    assert process.stdout is not None
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err.splitlines()[1:] == ["muster: completed"]


def test_another_run_on_a_workdir_in_use_is_refused_with_who_has_it_and_what_differs(muster):
    process = start_and_wait(muster, GRACEFUL)
    second = muster.run("--cluster.env.MODE=fast", program=GRACEFUL)
    assert second.returncode == 2
    owner = rundir.owner(muster.workdir)
    assert owner is not None
    assert f"run {owner['id']} on host {os.uname().nodename}" in second.stderr
    assert "cluster.env.MODE: '(absent)' there, 'fast' now" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    process.terminate()
    process.communicate(timeout=60)
    assert rundir.attempt_numbers(muster.workdir) == [0]


def test_the_same_command_again_looks_on_and_ends_with_the_runs_exit_code(muster):
    process = start_and_wait(muster, GRACEFUL)
    viewers = [muster.start(program=GRACEFUL, process_group=0) for _ in range(2)]
    for viewer in viewers:
        assert viewer.stdout is not None
        assert viewer.stdout.readline() == "ready\n"
    viewers[0].send_signal(signal.SIGINT)  # Ends the looking on alone.
    _, err = viewers[0].communicate(timeout=60)
    assert "the run goes on" in err
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=60)
    out, err = viewers[1].communicate(timeout=60)
    assert (viewers[1].returncode, out) == (75, "saved\n"), err
    assert "stopped; start the same command again" in err
    assert rundir.attempt_numbers(muster.workdir) == [0]


def peak_kib(pid: int) -> int:
    """The most memory a process has used so far, 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in status.splitlines() if "VmHWM" in row), 0)


def test_a_program_that_prints_a_hundred_megabytes_is_shown_in_part_in_little_memory(muster):
    program = """
        line = "x" * 99 + "\\n"
        for _ in range(100):
            print(line * 10000, end="")
        print("the end")
    """
    process = muster.start(program=program)
    with futures.ThreadPoolExecutor() as pool:
        output = pool.submit(process.communicate)
        # Not wait4's figure: that begins with the memory of the process that forked this one.
        peak = 0
        while not output.done():
            peak = max(peak, peak_kib(process.pid))
            time.sleep(0.01)
        shown, _ = output.result()
    assert process.returncode == 0
    assert shown.endswith("the end\n")
    assert "MB not shown; " in shown or len(shown) > 100e6
    assert 10_000 < peak < 150_000
    assert muster.log(0).endswith("the end\n")


def test_a_dry_run_prints_commands_without_secrets_and_starts_and_writes_nothing(muster):
    done = muster.run(
        "--dry_run", "--cluster.env.API_KEY=abc123", "--cluster.env.MODE=fast", program=GRACEFUL
    )
    assert done.returncode == 0
    assert done.stdout.count("program.py") == 2
    assert "MODE=fast" in done.stdout
    assert "abc123" not in done.stdout + done.stderr
    assert not muster.workdir.exists()


def test_progress_of_the_lead_stays_in_place_on_a_terminal(muster):
    program = """
        for step in range(3):
            print("step", step, flush=True)
        print("an ordinary line")
    """
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        muster.command(program=program),
        cwd=muster.folder,
        env=environment(),
        stdout=terminal,
        stderr=subprocess.DEVNULL,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(controller, 4096)
        except OSError:
            break
    process.wait(timeout=60)
    os.close(controller)
    assert shown == b"".join(
        [b"\rstep %d\x1b[K" % step for step in range(3)] + [b"\r\x1b[Kan ordinary line\r\n"]
    )


def test_status_and_logs_read_the_run_directory(muster):
    process = start_and_wait(muster, GRACEFUL)
    status = [*muster.command()[:3], "status", str(muster.workdir)]

    def report() -> dict:
        done = subprocess.run(
            [*status, "--json"], env=environment(), capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    assert report()["state"] == "running"
    follow = subprocess.Popen(
        [*muster.command()[:3], "logs", str(muster.workdir), "--process=1", "--follow"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert follow.stdout is not None
    assert follow.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate(timeout=60)
    assert follow.communicate(timeout=30)[0] == "saved\n"
    after = report()
    assert (after["state"], after["attempts"][0]["processes"][1]["exit_code"]) == ("stopped", 75)
    text = subprocess.run(status, env=environment(), capture_output=True, text=True, check=True)
    assert "attempt 0: stopped" in text.stdout
