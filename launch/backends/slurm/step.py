"""The one step of a job that matters: an agent on each node, and what it is told. Pure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import rundir
from launch.backends import host_plan
from launch.backends.host_plan import AttemptSpec
from launch.backends.slurm import container
from launch.program import Program, is_secret
from launch.spec import Cluster


def render(cluster: Cluster, program: Program, attempt: AttemptSpec) -> list[dict[str, Any]]:
    """The plan of each node's agent, in order of nodes.

    Args:
      cluster: how many processes on a node, and how they are kept.
      program: what every process runs.
      attempt: where.
    """

    def process_env(process_id: int) -> dict[str, str]:
        env = {**host_plan.gang_env(cluster, attempt, process_id), **device_env(cluster)}
        if cluster.slurm.gpus is not None:
            number = cluster.devices_per_process
            first = process_id % cluster.processes_per_host * number
            env["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(first + i) for i in range(number))
        # Secrets are in the job's environment already, and need not go over the network.
        return {**env, **{k: v for k, v in cluster.env.items() if not is_secret(k)}}

    plans = host_plan.render(cluster, program, attempt, process_env)
    for plan in plans:
        plan["tells_signals"] = True
        plan["complaints"] = str(rundir.agent_log_path(attempt.path, plan["host"]))
    return plans


def device_env(cluster: Cluster) -> dict[str, str]:
    """What makes a process's devices what the cluster has."""
    env = host_plan.cpu_env(cluster)
    if cluster.slurm.gpus is not None:
        # Every process sees all of its node's GPUs, so that they reach one another directly; which
        # are its own is said by their numbers. Without a GPU it must fail, not go on without.
        env["JAX_PLATFORMS"] = "cuda"
        del env["NPROC"], env["GLIBC_TUNABLES"], env["JAX_LOCAL_DEVICE_IDS"]
    return env


def agent_python(cluster: Cluster) -> str:
    """The interpreter on the nodes: this one, which they see too, or the container's."""
    return sys.executable if cluster.slurm.container is None else cluster.slurm.container_python


def command(cluster: Cluster, hosts: Sequence[str], door: Path, run_dir: Path) -> list[str]:
    """The srun that brings an agent to each node.

    Args:
      cluster: the container, if there is one.
      hosts: the nodes.
      door: the file in which agents read where the controller is.
      run_dir: the run directory.
    """
    agent = host_plan.agent_command(agent_python(cluster), str(door), "SLURMD_NODENAME")
    named = [f"--nodelist={','.join(hosts)}", "--job-name=muster"]
    return ["srun", *named, *options(cluster, len(hosts), run_dir), *agent]


def options(cluster: Cluster, number: int, run_dir: Path) -> list[str]:
    """Options of an srun that starts one task on each node, and what comes before the task's own
    command."""
    contained, before = container.wrap(cluster.slurm, run_dir)
    cpus = cluster.slurm.cpus_per_process
    return [
        *(f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1"),
        # srun does not take it over from the job.
        *([] if cpus is None else [f"--cpus-per-task={cpus * cluster.processes_per_host}"]),
        "--kill-on-bad-exit=0",  # Who is guilty is not srun's to judge.
        "--input=none",
        *contained,
        *before,
    ]
