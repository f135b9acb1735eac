"""gcloud's command lines, rendered purely: what is run, and what a dry run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.backends.tpu.gcloud import ALWAYS
from launch.spec import Cluster
from launch.spec.tpu import TpuSpec
from launch.topology import RUNTIME_VERSIONS

QUEUED = "queued-resources"
NODE = "tpu-vm"
RUN_LABEL = "muster-run"
NOTHING = ":"  # A command that does nothing, as often as gcloud may repeat it.


def _tpus(*words: str, project: str | None, zone: str) -> list[str]:
    named = [] if project is None else [f"--project={project}"]
    return ["gcloud", "compute", "tpus", *words, *named, f"--zone={zone}", *ALWAYS]


def create(
    cluster: Cluster, kind: str, zone: str, name: str, labels: Mapping[str, str]
) -> list[str]:
    """Ask for machines.

    Args:
      cluster: what is asked for.
      kind: QUEUED, for all slices at once, or NODE, for one.
      zone: where.
      name: of the queued resource, and the beginning of its nodes'; or of the node.
      labels: of the nodes.
    """
    spec = cluster.tpu
    version = spec.runtime_version or RUNTIME_VERSIONS[cluster.slice.generation]
    words = [kind, "create", name, f"--accelerator-type={cluster.accelerator}"]
    if kind == QUEUED:
        words.append(f"--runtime-version={version}")
        if cluster.slices == 1:
            words.append(f"--node-id={name}")
        else:
            words += [f"--node-count={cluster.slices}", f"--node-prefix={name}"]
    else:
        words.append(f"--version={version}")
    if spec.provisioning != "on_demand":
        words.append(f"--{spec.provisioning}")
    words += _options(spec)
    words.append(f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}")
    return _tpus(*words, project=spec.project, zone=zone)


def node_names(cluster: Cluster, name: str) -> tuple[str, ...]:
    """The nodes that a queued resource makes, in order of their slices."""
    if cluster.slices == 1:
        return (name,)
    return tuple(f"{name}-{index}" for index in range(cluster.slices))


def _options(spec: TpuSpec) -> list[str]:
    values = (
        ("network", spec.network),
        ("subnetwork", spec.subnetwork),
        ("service-account", spec.service_account),
        ("tags", ",".join(spec.tags) or None),
    )
    options = [f"--{name}={value}" for name, value in values if value is not None]
    return [*options, "--internal-ips"] if spec.internal_ips else options


def delete(project: str | None, kind: str, zone: str, name: str) -> list[str]:
    """Delete a queued resource with its nodes, or a node."""
    force = ["--force"] if kind == QUEUED else []
    return _tpus(kind, "delete", name, *force, project=project, zone=zone)


def describe(project: str | None, kind: str, zone: str, name: str) -> list[str]:
    """Ask for one queued resource or node."""
    return _tpus(kind, "describe", name, project=project, zone=zone)


def list_all(project: str | None, kind: str, zone: str) -> list[str]:
    """Ask for all queued resources or nodes of a zone."""
    return _tpus(kind, "list", project=project, zone=zone)


def ssh(cluster: Cluster, zone: str, node: str, worker: str, *more: str) -> list[str]:
    """Have gcloud connect to a worker of a node, which also brings the user's key there; with
    `--dry-run`, have it say how."""
    spec = cluster.tpu
    where = node if spec.ssh_user is None else f"{spec.ssh_user}@{node}"
    # Only alpha has a flag for internal addresses; GA takes them where there are no others.
    flags = [f"--worker={worker}", f"--command={NOTHING}", *more]
    argv = _tpus(NODE, "ssh", where, *flags, project=spec.project, zone=zone)
    return [word for word in argv if word != "--format=json"]


def shown_in_dry_run(cluster: Cluster, labels: Mapping[str, str], run: str) -> Sequence[list[str]]:
    """Every gcloud command of a run in which nothing goes wrong, in order."""
    spec, zone = cluster.tpu, cluster.tpu.zones[0]
    project = spec.project
    name = resource_name(run, 0)
    if spec.nodes:
        nodes: tuple[str, ...] = spec.nodes
        asked = []
        given_back = []
    elif spec.way == "queued":
        nodes = node_names(cluster, name)
        asked = [
            create(cluster, QUEUED, zone, name, labels),
            describe(project, QUEUED, zone, name),
        ]
        given_back = [delete(project, QUEUED, zone, name)]
    else:
        nodes = tuple(resource_name(run, index) for index in range(cluster.slices))
        asked = [create(cluster, NODE, zone, node, labels) for node in nodes]
        given_back = [delete(project, NODE, zone, node) for node in nodes]
    asked.append(list_all(project, NODE, zone))
    found = [
        argv
        for node in nodes
        for argv in (
            ssh(cluster, zone, node, "0"),
            ssh(cluster, zone, node, "all", "--dry-run"),
        )
    ]
    return [*asked, *found, *([] if spec.keep else given_back)]


def resource_name(run: str, number: int) -> str:
    """What the `number`-th thing that a run asks for is called: a letter first, and lower case, as
    ssh keeps the name of a host."""
    return f"muster-{run.lower()}-{number}"
