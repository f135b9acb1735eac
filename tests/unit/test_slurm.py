"""What is rendered for SLURM, what of it is refused, and what its answers mean."""

from __future__ import annotations

import difflib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import config_dict

from launch import contract, rundir, submission
from launch.backends import host_plan
from launch.backends.slurm import allocation, client, machines, script, step
from launch.backends.slurm.hostlist import expand
from launch.backends.slurm.job_watch import JobWatch
from launch.events import Interrupted, Retry, Verdict
from launch.ownership import RunDir
from launch.program import Program
from launch.request import Request
from launch.spec import ConfigError, cluster_spec, load_config
from launch.spec.fields import plain
from launch.spec.slurm import seconds_of_limit
from launch.standing import standing
from tests.testing.gangs import ROOT

GOLDEN = ROOT / "tests" / "golden"
RECORD = "python -m tests.unit.test_slurm"
JOB = script.JobSpec(Path("/runs/one"), Path("/code"), "/env/bin/python", "muster:run:job", 120.0)
CLUSTERS = {
    "cpu": {"backend": "slurm", "hosts": 2, "processes_per_host": 2},
    "gpu": {
        "backend": "slurm",
        "hosts": 4,
        "hosts_min": 2,
        "processes_per_host": 8,
        "setup": ("ulimit -n 65536", "export NCCL_DEBUG=WARN"),
        "slurm": {
            "partition": "a100",
            "account": "my lab",
            "qos": "high",
            "time": "1-12:00:00",
            "gpus_per_node": 8,
            "gpu_type": "a100",
            "cpus_per_process": 12,
            "mem": "0",
            "constraint": "nvlink&ib",
            "reservation": "maintenance's",
            "exclude": "n[7-9]",
            "exclusive": True,
            "array": "0-9%1",
            "dependency": "singleton",
            "directives": ("--mail-type=END", '--mail-user="me"@there', "--hint=nomultithread"),
            "modules": ("cuda/12.4", "odd name"),
            "warning_seconds": 300.0,
        },
    },
    "container": {
        "backend": "slurm",
        "hosts": 1,
        "devices_per_process": 4,
        "slurm": {"gres": "gpu:h100:4", "container": "nvcr.io#nvidia/jax:24.10", "requeue": False},
    },
}


def rendered(name: str) -> str:
    text = script.render(cluster_spec(CLUSTERS[name]), JOB)
    return text.replace(str(ROOT), "/muster")


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_batch_script_is_the_recorded_one_and_bash_can_read_it(name):
    want, got = (GOLDEN / f"slurm_{name}.sh").read_text(), rendered(name)
    changes = difflib.unified_diff(want.splitlines(), got.splitlines(), "recorded", "rendered")
    assert got == want, "\n".join([*changes, f"If it is meant, record it anew: {RECORD}"])
    subprocess.run(["bash", "-n"], input=got, text=True, check=True)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"partition": "a\nb"}, "cluster.slurm.partition='a\\nb': must be one line"),
        ({"job_name": "a\x1b[0m"}, "must be one line of printable characters"),
        ({"partition": ""}, "is empty; leave it out"),
        ({"time": "soon"}, "cluster.slurm.time='soon': must be minutes, HH:MM:SS or D-HH:MM:SS"),
        ({"mem": "64 GB"}, "must be a number with K, M, G or T behind it"),
        ({"array": "0-3"}, "must end in %1: two jobs must not train one run"),
        ({"gpus_per_node": 3}, "processes_per_host * devices_per_process = 2 * 1 = 2"),
        ({"gres": "gpu:a100:4"}, "cluster.slurm.gres=4: must be processes_per_host"),
        ({"gpu_type": "h100"}, "needs gpus_per_node"),
        ({"gres": "gpu:2", "gpus_per_node": 2}, "asks for GPUs, and so does gpus_per_node=2"),
        ({"directives": ("--time=1",)}, "has a field of its own: slurm.time"),
        ({"directives": ("--gpus-per-node=9",)}, "has a field of its own: slurm.gpus_per_node"),
        ({"directives": ("--output=x",)}, "is Muster's own to say"),
        ({"directives": ("-N 3",)}, "must be a long option of sbatch"),
        ({"directives": ("--x=1\n#SBATCH --uid=0",)}, "must be one line"),
        ({"container_runtime": "docker"}, "container_runtime='docker'"),
        ({"warning_seconds": 0}, "must be above 0"),
        ({"partion": "x"}, "no such field; did you mean 'partition'"),
        ({"requeue": False}, "restart.max_preemptions"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(section, message):
    restart = {"max_preemptions": 1}
    config = {"backend": "slurm", "processes_per_host": 2, "slurm": section, "restart": restart}
    with pytest.raises(ConfigError) as caught:
        cluster_spec(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("01:00:00", 3600),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-00:30:05", 88205),
        ("UNLIMITED", None),
        ("1:2:3:4", None),
    ],
)
def test_time_limits_are_read_as_slurm_means_them(text, seconds):
    assert seconds_of_limit(text) == seconds


HOSTLISTS = {
    "x": ["x"],
    "n[1-3,7]": ["n1", "n2", "n3", "n7"],
    "a[01-04]b[1-2]": [f"a{i:02d}b{j}" for i in range(1, 5) for j in (1, 2)],
    "n[08-11]": ["n08", "n09", "n10", "n11"],
    "n[1,3],n[1-2],m": ["n1", "n3", "n1", "n2", "m"],
    "a[001,3]": ["a001", "a3"],
    "n[1-2]-ib,m5.cluster": ["n1-ib", "n2-ib", "m5.cluster"],
    "rack[1-2]n[3-4]c": ["rack1n3c", "rack1n4c", "rack2n3c", "rack2n4c"],
}


@pytest.mark.parametrize("text", HOSTLISTS)
def test_node_lists_of_every_shape_are_expanded(text):
    assert expand(text) == HOSTLISTS[text]


@pytest.mark.parametrize("text", ["n[1-", "n]1[", "n[a-b]", "n[3-1]", "n[1-99999999]", "n[[1]]"])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(ValueError, match="host"):
        expand(text)


@pytest.mark.skipif(not shutil.which("scontrol"), reason="Debian's package slurm-client is missing")
@pytest.mark.parametrize("text", HOSTLISTS)
def test_scontrol_agrees_on_node_lists(text, tmp_path):
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nAuthType=auth/none\n")
    done = subprocess.run(
        ["scontrol", "show", "hostnames", text],
        env={"SLURM_CONF": str(conf), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "Invalid hostlist" in done.stderr:
        assert text in ("n[1-2]-ib,m5.cluster", "rack[1-2]n[3-4]c")  # SLURM 22.05 has no suffixes.
    else:
        assert done.stdout.split() == expand(text)


# As `scontrol --oneliner show job` of 22.05 writes it, less what is not read.
RUNNING = (
    "JobId=3 JobName=a b=c UserId=root(0) Priority=42 JobState=RUNNING Reason=None "
    "Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 ExitCode=0:0 TimeLimit=00:05:00 "
    "StartTime=2026-11-25T15:56:19 EndTime=2026-11-25T16:01:19 PreemptTime=None Partition=low "
    "NodeList=node[1-4] BatchHost=node1 Comment=muster:r:1 Power= "
)


def test_a_job_is_read_as_scontrol_tells_of_it():
    job = client.parse_job(RUNNING)
    assert (job.id, job.state, job.reason, job.restarts) == ("3", "RUNNING", "", 2)
    assert (job.partition, job.exit_code) == ("low", 0)
    assert job.end_at - job.start_at == 300
    assert job.preempted_at is None
    assert job.active


def test_a_pending_job_has_a_reason_of_many_words_and_no_nodes():
    line = RUNNING.replace("RUNNING Reason=None", "PENDING Reason=Nodes required are DOWN, Drained")
    line = line.replace("NodeList=node[1-4]", "NodeList=(null)").replace("=00:05:00", "=UNLIMITED")
    job = client.parse_job(line)
    assert job.reason == "Nodes required are DOWN, Drained"
    assert job.end_at is None  # EndTime is then a year away, or what SLURM guesses.


def test_a_preempted_job_has_an_end_even_without_a_limit():
    line = RUNNING.replace("=00:05:00", "=UNLIMITED")
    line = line.replace("PreemptTime=None", "PreemptTime=2026-11-25T15:57:00")
    job = client.parse_job(line)
    assert job.end_at is not None
    assert job.preempted_at is not None


@pytest.mark.parametrize(
    ("state", "down", "leaving"),
    [
        ("IDLE", False, False),
        ("ALLOCATED", False, False),
        ("MIXED+DRAIN", False, True),
        ("DOWN*", True, True),
        ("IDLE*", True, True),
        ("DOWN+DRAIN", True, True),
        ("ALLOCATED+MAINTENANCE", False, True),
    ],
)
def test_states_of_nodes_are_told_apart(state, down, leaving):
    words = {"State": state}
    assert machines._is(words, machines._DOWN) is down
    assert machines._is(words, machines._LEAVING) is leaving


def test_a_long_save_is_given_its_time_before_the_limit():
    assert machines.needed_seconds(120.0, 0.0, 30.0) == 120.0
    assert machines.needed_seconds(120.0, 20.0, 30.0) == 120.0
    assert machines.needed_seconds(120.0, 200.0, 30.0) == 430.0


def envs(**cluster) -> list[dict[str, str]]:
    spec = cluster_spec({"backend": "slurm", "hosts": 2, **cluster})
    attempt = host_plan.AttemptSpec(Path("/runs/one"), 0, ("n1", "n2"), "10.0.0.1:4242")
    plans = step.render(spec, Program(("true",)), attempt)
    assert all(plan["tells_signals"] for plan in plans)
    return [process["env"] for plan in plans for process in plan["processes"]]


def test_every_gpu_of_a_node_has_its_process():
    found = envs(processes_per_host=4, slurm={"gpus_per_node": 4})
    assert [env["JAX_LOCAL_DEVICE_IDS"] for env in found] == ["0", "1", "2", "3"] * 2
    found = envs(processes_per_host=2, devices_per_process=2, slurm={"gres": "gpu:4"})
    assert [env["JAX_LOCAL_DEVICE_IDS"] for env in found] == ["0,1", "2,3"] * 2
    assert {env["JAX_PLATFORMS"] for env in found} == {"cuda"}


def test_secrets_are_not_part_of_what_goes_over_the_network():
    found = envs(env={"NAME": "value", "API_KEY": "hush"})
    assert {env.get("NAME") for env in found} == {"value"}
    assert not any("hush" in env.values() for env in found)


def test_nodes_without_gpus_compute_on_cpu_devices():
    found = envs(processes_per_host=2, devices_per_process=3)
    assert {env["JAX_PLATFORMS"] for env in found} == {"cpu"}
    assert {env["JAX_NUM_CPU_DEVICES"] for env in found} == {"3"}


def test_the_step_has_one_agent_on_each_node_and_its_share():
    cluster = cluster_spec(
        {"backend": "slurm", "processes_per_host": 2, "slurm": {"cpus_per_process": 3}}
    )
    argv = step.command(cluster, ("n1", "n2"), Path("/d/door.json"), Path("/runs/one"))
    assert argv[:2] == ["srun", "--nodelist=n1,n2"]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"} <= set(argv)
    assert argv[-2:] == ["/d/door.json", "SLURMD_NODENAME"]


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container_sees_the_run_the_code_and_what_it_is_given(runtime, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    section = {
        "gres": "gpu:1",
        "container": "jax.sif",
        "container_runtime": runtime,
        "container_mounts": ("/data:/data",),
    }
    cluster = cluster_spec({"backend": "slurm", "slurm": section})
    argv = step.command(cluster, ("n1",), Path("/d"), Path("/runs/one"))
    mounts = ["/runs/one:/runs/one", f"{ROOT}:{ROOT}", f"{tmp_path}:{tmp_path}", "/data:/data"]
    if runtime == "pyxis":
        assert "--container-image=jax.sif" in argv
        assert f"--container-mounts={','.join(mounts)}" in argv
        assert "python3" in argv
    else:
        start = argv.index("apptainer")
        binds = [word for mount in mounts for word in ("--bind", mount)]
        tail = ["--pwd", str(tmp_path), "jax.sif", "python3"]
        assert argv[start : start + 3 + len(binds) + 4] == [
            *("apptainer", "exec", "--nv"),
            *binds,
            *tail,
        ]


def request(folder: Path, config=None, **env: str) -> Request:
    cluster = cluster_spec(
        {"backend": "slurm", "hosts": 2, "env": env, "slurm": {"time": "5"}, "hosts_min": 1}
    )
    argv = [
        "python",
        "-m",
        "trainer.main",
        "--config=/c.py",
        "--config.a.b=2",
        f"--workdir={folder}",
    ]
    return Request(
        cluster, Program(tuple(argv), {"P": "x"}), folder, config, ("muster",), (), False
    )


def test_a_submission_comes_back_as_it_was_and_holds_no_secret(tmp_path):
    config = config_dict.ConfigDict(
        {"a": {"b": 2, "c": (1, "x'y\"z", None)}, "rate": 1e-3, "cap": float("inf"), "on": True}
    )
    wanted = request(tmp_path, config, NAME="value", API_KEY="hush")
    submission.write_submission(tmp_path, wanted)
    assert all("hush" not in path.read_text() for path in tmp_path.iterdir())
    found = submission.read_submission(tmp_path, {"API_KEY": "hush"})
    assert found.cluster == wanted.cluster
    frozen = tmp_path / submission.CONFIG
    assert list(found.program.argv) == [
        *("python", "-m", "trainer.main"),
        f"--config={frozen}",
        f"--workdir={tmp_path}",
    ]
    assert found.program.env == wanted.program.env
    again = load_config("config", [f"--config={frozen}"]).config
    assert plain(again) == plain(config)
    for path in (frozen, tmp_path / submission.SUBMISSION):
        assert path.stat().st_mode & 0o077 == 0


def test_a_config_that_is_no_text_keeps_its_file(tmp_path):
    wanted = request(tmp_path, config_dict.ConfigDict({"a": object()}))
    assert submission._frozen_argv(tmp_path, wanted) == list(wanted.program.argv)


def test_without_a_submission_the_job_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read.*submit the run again"):
        submission.read_submission(tmp_path, {})


def test_attempts_of_a_job_are_its_history_and_others_are_not(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    for ids, cause in ((["1"], "exception"), (["2"], "preempted"), (["2"], "killed")):
        attempt = run_dir.new_attempt(["n1"], 1, ids)
        contract.write_atomically(
            rundir.progress_path(attempt.path, 0), '{"step": 7, "first_step": 3}'
        )
        rundir.log_path(attempt.path, 0).touch()
        attempt.close(Verdict(cause, 75, "m", 0), Retry(True), guilty_step=6)
    found = allocation.history(run_dir.path, "2")
    assert [outcome.verdict.cause for outcome in found] == ["preempted", "killed"]
    assert [(outcome.guilty_step, outcome.last_step) for outcome in found] == [(6, 7)] * 2
    run_dir.release()


def test_what_nobody_could_bring_to_an_end_is_a_lost_host(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.new_attempt(["n3", "n4"], 1, ["5"])
    allocation._close_abandoned(run_dir, "6")  # Another job's.
    assert rundir.attempt_record(run_dir.path, 0)["cause"] is None
    allocation._close_abandoned(run_dir, "5")
    record = rundir.attempt_record(run_dir.path, 0)
    assert (record["cause"], record["guilty_host"]) == ("host_lost", "n3")
    assert record["retry"]["again"]
    run_dir.release()


def test_what_the_controller_knew_before_it_was_killed_is_believed(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    attempt = run_dir.new_attempt(["n3", "n4"], 1, ["5"])
    attempt.note(Interrupted("preempted", "job 5 is preempted", 1.0))
    assert standing(run_dir.path).state == "running"  # We hold it.
    run_dir.release()
    assert standing(run_dir.path).state == "preempted"
    run_dir = RunDir(tmp_path / "run")
    allocation._close_abandoned(run_dir, "5")
    record = rundir.attempt_record(run_dir.path, 0)
    assert (record["cause"], record["message"]) == ("preempted", "job 5 is preempted")
    assert record["guilty_host"] is None
    assert "notice" not in record
    run_dir.release()


def test_a_watch_tells_a_job_that_is_over_from_a_slurm_that_is_silent(monkeypatch):
    answers = [client.UnavailableError("busy"), client.parse_job(RUNNING), None]
    asked = []

    def answer(job_id: str):
        asked.append(job_id)
        found = answers[min(len(asked), len(answers)) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(client, "job", answer)
    watch = JobWatch("3", every_seconds=0.05)
    limit = time.monotonic() + 10
    silent = False
    while not watch.over and time.monotonic() < limit:
        silent = silent or watch.silent_since is not None
        time.sleep(0.01)
    assert silent
    assert watch.over
    assert watch.silent_since is None
    assert watch.job is not None
    watch.close()


def main() -> None:
    """Record the scripts anew."""
    for name in CLUSTERS:
        (GOLDEN / f"slurm_{name}.sh").write_text(rendered(name))


if __name__ == "__main__":
    sys.exit(main())
