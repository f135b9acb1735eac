"""The program as it runs on TPU VMs; what a dry run prints of it, and of gcloud's commands."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from launch import contract, rundir
from launch.backends.tpu import commands, gcloud, plans
from launch.backends.tpu.code import checked_tree
from launch.backends.tpu.holdings import labels
from launch.backends.tpu.plans import CONFIG_PLACE, GangSpec, Prepared
from launch.backends.tpu.reach import Host
from launch.program import Program, without_secrets
from launch.request import Request
from launch.spec import Cluster, ConfigError, plain
from launch.submission import frozen_config


def storage_of(request: Request, run_id: str) -> str | None:
    """The run's own directory for what lasts."""
    base = request.cluster.tpu.storage
    if request.url is not None or base is None:
        return request.url
    return f"{base.rstrip('/')}/{request.workdir.name}-{run_id}"


def remote_program(request: Request, storage: str | None) -> tuple[Program, dict[str, str]]:
    """The program as it runs on the hosts, and the files that go along.

    Raises:
      ConfigError: the trainer has nowhere to keep its checkpoints.
    """
    if request.config is None:
        return request.program, {}
    if storage is None:
        rule = (
            "is missing: checkpoints go there, for machines come and go; give "
            "gs://BUCKET/DIRECTORY, or --workdir=gs://BUCKET/PATH"
        )
        raise ConfigError("cluster.tpu.storage", rule)
    argv = list(request.program.argv)
    source = next(word for word in argv if word.startswith("--config="))
    text = frozen_config(plain(request.config), source.partition("=")[2])
    if text is None:
        rule = "holds values that have no form as text, and must be in the current directory's tree"
        raise ConfigError("--config", rule, source.partition("=")[2])
    return (
        Program(
            ("python", "-m", "trainer.main", f"--config={CONFIG_PLACE}", f"--workdir={storage}")
        ),
        {plans.CONFIG: text},
    )


def dry_run(request: Request) -> None:
    """Print every gcloud command in order, what goes over ssh, and a plan of an agent."""
    cluster = request.cluster
    record = rundir.read_record(request.workdir / contract.RUN_RECORD) or {}
    run_id = str(record.get("id") or "RUN")
    print("# gcloud, in this order; what is waited for is asked for again and again")
    for argv in commands.shown_in_dry_run(cluster, labels(cluster, run_id), run_id):
        print(shlex.join(argv))
    storage = storage_of(request, run_id)
    program, files = remote_program(request, storage)
    first: dict[str, str] = {}
    for plan in rendered(cluster, program, files, storage, run_id):
        for process in plan["processes"]:
            env = without_secrets(process["env"])
            print(f"\n# process {process['process_id']}/{cluster.num_processes} on {plan['host']}")
            if first:
                other = [f"{name}={value}" for name, value in env.items() if first[name] != value]
                print(f"# as process 0, with {shlex.join(other)}")
                continue
            first = env
            print(shlex.join(["cd", plan["cwd"]]))
            words = ["env", *(f"{name}={value}" for name, value in env.items())]
            print(shlex.join([*words, *process["argv"]]))


def rendered(
    cluster: Cluster, program: Program, files: dict[str, str], storage: str | None, run_id: str
) -> list[dict[str, Any]]:
    """The agents' plans of a first attempt, on hosts that are not there yet."""
    spec = cluster.tpu
    name = commands.resource_name(run_id, 0)
    if spec.nodes:
        nodes = spec.nodes
    elif spec.way == "queued":
        nodes = commands.node_names(cluster, name)
    else:
        nodes = tuple(commands.resource_name(run_id, i) for i in range(cluster.slices))
    each = cluster.hosts // cluster.slices
    home = "~/.muster"
    code = f"{home}/code/DIGEST"
    bins = (f"{home}/env/KEY/venv/bin",) if spec.packages else ()
    python = f"{bins[0]}/python" if bins else spec.python
    hosts = tuple(
        Prepared(
            Host(f"{node}-w{worker}", node, index, worker, f"{node}-w{worker}", ()),
            home,
            code,
            spec.container_python if spec.container else python,
            bins,
            (code,),
        )
        for index, node in enumerate(nodes)
        for worker in range(each)
    )
    coordinator = f"{hosts[0].host.address}:PORT"
    gang = GangSpec(run_id, 0, coordinator, hosts, storage, spec.max_lifetime_seconds, files, (),
                    "DIGEST")  # fmt: skip
    return plans.render(cluster, program, gang)


def with_project(request: Request) -> Request:
    """With the project named, in which everything will be.

    Raises:
      ConfigError: there is none.
    """
    cluster = request.cluster
    tpu = dataclasses.replace(cluster.tpu, project=gcloud.project_of(cluster.tpu))
    return dataclasses.replace(request, cluster=dataclasses.replace(cluster, tpu=tpu))


def check(request: Request) -> None:
    """Refuse before anything is asked for what could not be sent, or has nowhere to go.

    Raises:
      ConfigError: says what.
    """
    gcloud.check_installed()
    remote_program(request, storage_of(request, "RUN"))
    spec = request.cluster.tpu
    if spec.send_code:
        checked_tree(spec.max_file_bytes, request.workdir)
