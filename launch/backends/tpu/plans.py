"""What the agent on each TPU VM is told to do, rendered purely."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract, rundir
from launch.agent.cloud import METADATA_HOST
from launch.backends import host_plan
from launch.backends.host_plan import AttemptSpec
from launch.backends.tpu.commands import QUEUED
from launch.backends.tpu.ledger import Asked
from launch.backends.tpu.reach import Host
from launch.program import Program
from launch.spec import Cluster

MEGASCALE_PORT = 8081
METADATA = "metadata.google.internal"
API = "https://tpu.googleapis.com/"
_PYTHONS = ("python", "python3")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A host on which everything is in place.

    Attributes:
      host: which.
      home: Muster's directory on it.
      cwd: where the program runs.
      python: the interpreter that runs it.
      path: folders that come first in PATH.
      python_path: folders that come first where Python looks.
    """

    host: Host
    home: str
    cwd: str
    python: str
    path: tuple[str, ...]
    python_path: tuple[str, ...]

    def run_dir(self, run_id: str) -> Path:
        """What is the run directory on it."""
        return Path(self.home) / "runs" / run_id


@dataclasses.dataclass(frozen=True)
class GangSpec:
    """One attempt of a gang on TPU VMs.

    Attributes:
      run_id: the run's.
      number: the attempt's.
      coordinator: `host:port` of process 0's service.
      hosts: all of them, in order.
      storage: the run's directory for checkpoints; None for none.
      deadline_seconds: how long it may go on without a controller.
      files: on every host, name in the attempt's directory -> text.
      machines: what is to be given back in the end, full names; () for nothing.
      bundle: digest of the packages that agents run from.
    """

    run_id: str
    number: int
    coordinator: str
    hosts: tuple[Prepared, ...]
    storage: str | None
    deadline_seconds: float
    files: Mapping[str, str]
    machines: tuple[str, ...]
    bundle: str = ""


def render(cluster: Cluster, program: Program, gang: GangSpec) -> list[dict[str, Any]]:
    """The plan of each host's agent (see launch.agent and launch.agent.served)."""
    return [_plan(cluster, program, gang, index) for index in range(len(gang.hosts))]


def _plan(cluster: Cluster, program: Program, gang: GangSpec, index: int) -> dict[str, Any]:
    prepared = gang.hosts[index]
    names = tuple(other.host.name for other in gang.hosts)
    attempt = AttemptSpec(prepared.run_dir(gang.run_id), gang.number, names, gang.coordinator)

    def process_env(process_id: int) -> dict[str, str]:
        env = host_plan.gang_env(cluster, attempt, process_id)
        if cluster.on_cpu:
            env |= host_plan.cpu_env(cluster)
        else:
            # On a TPU VM, JAX finds its place by the machine's own metadata.
            env = {name: text for name, text in env.items() if not name.startswith("OMPI_")}
            del env["JAX_COORDINATOR_BIND_ADDRESS"]
            env |= {"JAX_PLATFORMS": "tpu"}
        env |= _slice_env(cluster, gang, prepared.host)
        env |= _place_env(prepared, gang.storage)
        return {**env, **cluster.env, **_python_path(prepared, cluster.env)}

    argv = list(program.argv)
    if argv[0] in _PYTHONS:
        argv[0] = prepared.python
    argv = [word.replace(CONFIG_PLACE, str(attempt.path / CONFIG)) for word in argv]
    plans = host_plan.render(cluster, Program(tuple(argv)), attempt, process_env)
    plan = plans[index]
    files = {str(attempt.path / name): text for name, text in gang.files.items()}
    plan.update(
        hook=f"{prepared.home}/agent/{gang.bundle}/launch/hook",
        folder=str(attempt.path),
        cwd=prepared.cwd,
        files=files,
        tells_signals=True,
        complaints=str(rundir.agent_log_path(attempt.path, prepared.host.name)),
        unattended_seconds=gang.deadline_seconds,
        idle_seconds=cluster.tpu.idle_seconds,
        release=_release(cluster, gang.machines),
    )
    return plan


# The config as it was when the run was started goes along with the plan.
CONFIG = "config.py"
CONFIG_PLACE = "{muster-config}"


def _slice_env(cluster: Cluster, gang: GangSpec, host: Host) -> dict[str, str]:
    """What libtpu needs to join slices."""
    if cluster.slices == 1:
        return {}
    return {
        "MEGASCALE_COORDINATOR_ADDRESS": f"{gang.hosts[0].host.address}:{MEGASCALE_PORT}",
        "MEGASCALE_NUM_SLICES": str(cluster.slices),
        "MEGASCALE_SLICE_ID": str(host.slice),
        "MEGASCALE_PORT": str(MEGASCALE_PORT),
    }


def _place_env(prepared: Prepared, storage: str | None) -> dict[str, str]:
    paths = [*prepared.path, "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    env = {"PATH": os.pathsep.join(paths)}
    return env if storage is None else {**env, contract.STORAGE_DIR: storage}


def _python_path(prepared: Prepared, env: Mapping[str, str]) -> dict[str, str]:
    own = env.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [*prepared.python_path, own]))}


def _release(cluster: Cluster, machines: Sequence[str]) -> dict[str, Any] | None:
    if not machines:
        return None
    return {
        "metadata": cluster.env.get(METADATA_HOST, METADATA),
        "api": os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU", API),
        "resources": list(machines),
    }


def full_names(asked: Sequence[Asked], project: str) -> tuple[str, ...]:
    """What the API calls the things of a ledger that are ours."""
    return tuple(
        f"projects/{project}/locations/{one.zone}/"
        f"{'queuedResources' if one.kind == QUEUED else 'nodes'}/{one.name}"
        for one in asked
        if one.owned
    )


def container_argv(cluster: Cluster, run_id: str, number: int, home: str) -> list[str]:
    """What comes before an agent's command to run it in a container; [] for none."""
    image = cluster.tpu.container
    if image is None:
        return []
    # Chips need a privileged container; the gang's ports are the host's own.
    return [
        *("docker", "run", "--rm", "--init", "--privileged", "--network=host", "--ipc=host"),
        *("--name", f"muster-{run_id}-{number}", "--volume", f"{home}:{home}", image),
    ]
