"""Jobs on SLURM: asked for, found again, told apart, and ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import contract, rundir
from tests.testing.gangs import ROOT, environment, wait_until
from tests.testing.slurm import SlurmMuster

WAITS = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def busy(slurm):
    """Another user's job on all nodes; cancelled by the test or at its end."""
    options = ["-N4", "--exclusive", "-t10", "--output=/dev/null"]
    job_id = slurm.command("sbatch", "--parsable", *options, "--wrap=sleep 600").strip()
    wait_until(lambda: slurm.job(job_id)["JobState"] == "RUNNING", "the other job")
    return job_id


def test_a_queued_run_says_why_is_found_again_and_is_cancelled(slurm, busy, muster):
    started = muster.start(program=WAITS)
    job_id = muster.job_id()
    wait_until(lambda: slurm.job(job_id)["Reason"] in ("Resources", "Priority"), "a reason")
    report = json.loads(muster.other("status", str(muster.workdir), "--json").stdout)
    assert report["state"] == "queued"
    assert (report["job"]["id"], report["job"]["state"]) == (job_id, "PENDING")
    assert report["job"]["reason"] in ("Resources", "Priority")
    text = muster.other("status", str(muster.workdir)).stdout
    assert f"queued as SLURM job {job_id}" in text
    assert f"queued, job {job_id}" in muster.other("list").stdout

    # The same command again submits nothing, and Ctrl-C then ends the looking on alone.
    again = muster.start(program=WAITS)
    wait_until(lambda: "looking on" in again.stderr.readline(), "the job to be found")
    wait_until(lambda: "Ctrl-C leaves it running" in again.stderr.readline(), "its promise")
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=30)
    assert again.returncode == contract.EXIT_RESUMABLE
    assert slurm.job(job_id)["JobState"] == "PENDING"
    other = muster.run("--cluster.hosts=1", program=WAITS)
    assert other.returncode == contract.EXIT_CONFIG
    assert "It is not what this command would start" in other.stderr

    stopped = muster.other("stop", str(muster.workdir))
    assert stopped.returncode == contract.EXIT_DONE, stopped.stderr
    assert f"cancelled SLURM job {job_id}" in stopped.stderr
    _, err = started.communicate(timeout=30)
    assert started.returncode == contract.EXIT_RESUMABLE
    assert "pending: Resources" in err or "pending: Priority" in err
    assert slurm.job(job_id)["JobState"] == "CANCELLED"
    report = json.loads(muster.other("status", str(muster.workdir), "--json").stdout)
    assert report["state"] == "stopped"


def test_detached_it_goes_on_is_followed_and_stopped_from_elsewhere(slurm, muster):
    done = muster.run("--detach", program=WAITS)
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert f"is SLURM job {muster.job_id()}" in done.stdout
    muster.wait_for_log("ready", processes=4)
    logs = subprocess.Popen(
        [sys.executable, "-m", "launch", "logs", str(muster.workdir), "--follow", "--process=all"],
        cwd=muster.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    report = json.loads(muster.other("status", str(muster.workdir), "--json").stdout)
    assert report["state"] == "running"
    assert [p["host"] for p in report["attempts"][0]["processes"]] == ["node1"] * 2 + ["node2"] * 2
    stopped = muster.other("stop", str(muster.workdir))
    assert stopped.returncode == contract.EXIT_DONE, stopped.stderr
    out, _ = logs.communicate(timeout=30)
    assert sorted(line for line in out.splitlines() if "ready" in line) == [
        f"[process {i}/4] ready" for i in range(4)
    ]
    assert muster.causes() == ["stopped"]
    wait_until(lambda: slurm.job(muster.job_id())["JobState"] == "FAILED", "the job's end")
    assert slurm.job(muster.job_id())["ExitCode"] == "75:0"


def test_ctrl_c_stops_the_run_and_a_second_one_kills_it(slurm, tmp_path):
    muster = SlurmMuster(tmp_path, grace_seconds=300.0)
    stubborn = WAITS.replace("lambda *_: sys.exit(75)", "signal.SIG_IGN")
    started = muster.start(program=stubborn)
    muster.wait_for_log("ready", processes=4)
    for word in ("once more to kill it", "at once"):
        started.send_signal(signal.SIGINT)
        wait_until(lambda word=word: word in started.stderr.readline(), word)
    started.communicate(timeout=60)
    assert started.returncode == contract.EXIT_RESUMABLE
    assert muster.causes() == ["stopped"]
    muster.check_nothing_is_left()


def test_a_closed_terminal_leaves_the_job_alone(slurm, muster):
    started = muster.start(program=WAITS)
    muster.wait_for_log("ready", processes=4)
    started.send_signal(signal.SIGHUP)
    _, err = started.communicate(timeout=30)
    assert "goes on" in err
    assert slurm.job(muster.job_id())["JobState"] == "RUNNING"
    muster.other("stop", str(muster.workdir))


def test_a_job_whose_submission_got_no_answer_is_found_by_its_comment(slurm, muster):
    muster.run("--detach", program=WAITS)
    muster.wait_for_log("ready", processes=4)
    path = muster.workdir / "jobs.json"
    record = json.loads(path.read_text())
    job_id, record["jobs"][0]["job_id"] = record["jobs"][0]["job_id"], None
    path.write_text(json.dumps(record))
    report = json.loads(muster.other("status", str(muster.workdir), "--json").stdout)
    assert report["state"] == "running"
    stopped = muster.other("stop", str(muster.workdir))
    assert stopped.returncode == contract.EXIT_DONE, stopped.stderr
    muster.other("status", str(muster.workdir))
    again = muster.run(program="print('second')")
    assert again.returncode == contract.EXIT_DONE, again.stderr
    assert muster.job_id() != job_id


def test_three_jobs_at_once_on_the_same_nodes_do_not_meet(slurm, tmp_path):
    program = """
        import jax
        jax.distributed.initialize()
        from jax.experimental import multihost_utils
        import time
        for _ in range(5):
            total = multihost_utils.process_allgather(jax.numpy.ones(())).sum()
            time.sleep(0.5)
        print("gang", jax.process_count(), int(total), flush=True)
    """
    gangs = []
    for name in "abc":
        (tmp_path / name).mkdir()
        gangs.append(
            SlurmMuster(
                tmp_path / name,
                processes_per_host=1,
                slurm={"nodelist": "node[1-2]"},
                env={"XLA_FLAGS": ""},
            )
        )
    started = [gang.start("--process=all", program=program) for gang in gangs]
    for gang, process in zip(gangs, started, strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == contract.EXIT_DONE, err
        assert [line for line in out.splitlines() if "gang" in line] == [
            "[process 0/2] gang 2 2",
            "[process 1/2] gang 2 2",
        ] or sorted(line for line in out.splitlines() if "gang" in line) == [
            "[process 0/2] gang 2 2",
            "[process 1/2] gang 2 2",
        ]
        assert gang.attempt()["hosts"] == ["node1", "node2"]
    times = [(gang.attempt()["started_at"], gang.attempt()["ended_at"]) for gang in gangs]
    assert max(start for start, _ in times) < min(end for _, end in times)  # They were together.


def test_gpus_are_all_seen_and_told_apart(slurm, tmp_path):
    muster = SlurmMuster(
        tmp_path,
        slurm={"gpus_per_node": 2},
        env={"JAX_PLATFORMS": "cpu", "HF_TOKEN": "hush"},
    )
    program = """
        import os
        names = ("SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "HF_TOKEN")
        print("sees", *(os.environ.get(name) for name in names), flush=True)
    """
    done = muster.run("--process=all", program=program)
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if "sees" in line) == [
        "[process 0/4] sees node1 0,1 0 hush",
        "[process 1/4] sees node1 0,1 1 hush",
        "[process 2/4] sees node2 0,1 0 hush",
        "[process 3/4] sees node2 0,1 1 hush",
    ]
    # The secret was handed over in the environment, and is written nowhere.
    for path in muster.workdir.rglob("*"):
        assert not path.is_file() or "process-" in path.name or "hush" not in path.read_text()


def test_one_process_on_a_node_takes_all_of_its_gpus(slurm, tmp_path):
    muster = SlurmMuster(
        tmp_path,
        processes_per_host=1,
        devices_per_process=2,
        slurm={"gres": "gpu:2"},
        env={"JAX_PLATFORMS": "cpu"},
    )
    program = """
        import os
        print("sees", os.environ["CUDA_VISIBLE_DEVICES"], os.environ["JAX_LOCAL_DEVICE_IDS"])
    """
    done = muster.run("--process=all", program=program)
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if "sees" in line) == [
        "[process 0/2] sees 0,1 0,1",
        "[process 1/2] sees 0,1 0,1",
    ]


ODD = [
    "a b",
    "it's",
    'say "hi"',
    "$(touch INJECTED)",
    "`touch INJECTED`",
    "a;touch INJECTED",
    "per%cent %j",
    "back\\slash",
    "hash # tag",
    "-x",
]


@pytest.mark.parametrize("name", ODD)
def test_names_arrive_as_they_are(slurm, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    muster = SlurmMuster(folder, hosts=1, processes_per_host=1, slurm={"job_name": name})
    muster.workdir = folder / f"run {name}"
    program = (
        "import os, sys; "
        f"assert sys.argv[1] == {name!r} and os.getcwd() == {str(folder)!r}, os.getcwd()"
    )
    command = [*muster.command(), "--", sys.executable, "-c", program, name]
    done = muster.run_words(command)
    assert done.returncode == contract.EXIT_DONE, done.stderr
    job_id = muster.job_id()
    assert slurm.command("squeue", "-h", "-t", "all", "-j", job_id, "-o", "%j").rstrip("\n") == name
    assert "attempt 0" in (muster.workdir / contract.CONTROLLER_LOG).read_text()
    assert not list(tmp_path.rglob("INJECTED"))


def test_setup_that_fails_starts_nothing_and_is_shown(slurm, tmp_path):
    muster = SlurmMuster(tmp_path, setup=("export GREETING='so it is'", 'test -n "$GREETING"'))
    program = "import os; print(os.environ['GREETING'])"
    done = muster.run(program=program)
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert "so it is" in done.stdout
    broken = SlurmMuster(tmp_path, setup=("echo no such thing >&2; false",))
    broken.workdir = tmp_path / "broken"
    done = broken.run(program=program)
    assert done.returncode == contract.EXIT_FAILED
    assert "has ended: FAILED" in done.stderr
    assert "no such thing" in done.stderr
    assert rundir.attempt_numbers(broken.workdir) == []


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"partition": "hihg"}, "--cluster.slurm.partition"),
        ({"gpus_per_node": 7}, "gpus_per_node"),
        ({"constraint": "nosuch"}, "--cluster.slurm.constraint"),
    ],
)
def test_what_slurm_refuses_is_one_line_and_exit_code_2(slurm, tmp_path, section, says):
    per_host = section.get("gpus_per_node", 2)
    muster = SlurmMuster(tmp_path, processes_per_host=per_host, slurm=section)
    done = muster.run(program="print('never')")
    assert done.returncode == contract.EXIT_CONFIG
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "SLURM refuses the job" in lines[0]
    assert says in lines[0]


def test_a_job_that_can_never_start_says_so_and_ctrl_c_cancels_it(slurm, tmp_path):
    muster = SlurmMuster(tmp_path, slurm={"time": "02:00:00"})  # The partition allows one hour.
    started = muster.start(program="print('never')")
    wait_until(lambda: "with which it never starts" in started.stderr.readline(), "the warning")
    assert "with which it never starts" in muster.other("status", str(muster.workdir)).stdout
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=30)
    assert started.returncode == contract.EXIT_RESUMABLE
    assert "was cancelled" in err
    assert slurm.job(muster.job_id())["JobState"] == "CANCELLED"


def test_a_chain_of_jobs_goes_on_where_the_one_before_stopped(slurm, tmp_path):
    muster = SlurmMuster(
        tmp_path,
        hosts=1,
        processes_per_host=1,
        restart={"max_failures": 0},
        slurm={"array": "0-5%1", "dependency": "singleton"},
    )
    program = """
        import os, pathlib, sys
        saved = pathlib.Path(os.environ["MUSTER_RUN_DIR"], "saved")
        step = int(saved.read_text()) + 1 if saved.exists() else 1
        saved.write_text(str(step))
        sys.exit(0 if step >= 3 else 75)
    """
    done = muster.run(program=program)
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert muster.causes() == ["preempted", "preempted", "completed"]
    # What was left of the chain has nothing to go on with.
    wait_until(lambda: slurm.command("squeue", "-h") == "", "the rest to be cancelled")
    time.sleep(1.0)
    assert len(rundir.attempt_numbers(muster.workdir)) == 3
    report = json.loads(muster.other("status", str(muster.workdir), "--json").stdout)
    assert report["state"] == "completed"


def test_doctor_tries_the_nodes_and_says_what_is_wrong(slurm, tmp_path):
    muster = SlurmMuster(tmp_path, devices_per_process=1)
    words = ("doctor", f"--cluster={muster.cluster_file}", f"--workdir={tmp_path}")
    well = muster.other(*words)
    assert well.returncode == contract.EXIT_DONE, well.stdout + well.stderr
    for what in ("SLURM", "partition", "shape", "shared directory", "environment", "network"):
        assert f"ok   {what}: " in well.stdout
    assert "node1, node2" in well.stdout
    # A partition that cannot, nodes that lack a device, a directory that the nodes do not see.
    small = muster.other(*words, "--cluster.slurm.partition=small")
    assert small.returncode == contract.EXIT_FAILED
    assert "FAIL partition" in small.stdout
    assert "MaxNodes is 1" in small.stdout
    fewer = SlurmMuster(tmp_path, env={"JAX_NUM_CPU_DEVICES": "3"})
    lack = fewer.other(*words)
    assert lack.returncode == contract.EXIT_FAILED
    assert "FAIL devices: asked JAX on node1, node2: 3" in lack.stdout
    assert not list(tmp_path.glob(".muster-doctor-*"))


def test_doctor_on_a_full_cluster_says_that_it_could_not_try(slurm, busy, tmp_path):
    muster = SlurmMuster(tmp_path)
    done = muster.other("doctor", f"--cluster={muster.cluster_file}", "--wait=2")
    assert "?    nodes: " in done.stdout
    assert "still waiting: " in done.stdout
    assert slurm.command("squeue", "-h", "-o", "%A").split() == [busy]


def test_without_slurm_it_is_one_clear_line(tmp_path: Path):
    muster = SlurmMuster(tmp_path)
    nowhere = {**environment(), "PATH": str(tmp_path)}
    done = muster.run_words(muster.command(program="print('never')"), cwd=ROOT, env=nowhere)
    assert done.returncode == contract.EXIT_CONFIG
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no SLURM on this machine: sbatch is not on the PATH" in done.stderr
    assert not muster.workdir.exists()


@pytest.mark.skipif(Path("/etc/slurm/slurm.conf").exists(), reason="this machine has a SLURM")
def test_a_slurm_without_a_configuration_is_one_clear_line(slurm, tmp_path):
    muster = SlurmMuster(tmp_path)
    unset = {name: value for name, value in environment().items() if name != "SLURM_CONF"}
    done = muster.run_words(muster.command(program="print('never')"), env=unset)
    assert done.returncode == contract.EXIT_CONFIG
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "finds no configuration" in done.stderr
    text = muster.other("status", str(muster.workdir)).stdout
    assert "SLURM job" not in text


def test_dry_run_prints_the_script_and_every_process_and_submits_nothing(slurm, muster):
    done = muster.run("--dry_run", "--cluster.env.API_KEY=hush", program="print('never')")
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=run\n")
    assert done.stdout.count("MUSTER_PROCESS_ID=") == 4
    assert "srun --nodelist=NODE0,NODE1" in done.stdout
    assert "API_KEY=***" in done.stdout
    assert "hush" not in done.stdout
    assert not muster.workdir.exists()
    assert slurm.command("squeue", "-h") == ""
