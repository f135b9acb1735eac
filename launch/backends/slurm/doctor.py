"""`muster doctor` on SLURM: asks it, and runs a small job of the same shape on its nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch import command
from launch.backends.host_plan import ROOT
from launch.backends.slurm import client, probe, script, step
from launch.doctor import Finding, environment_findings, writable
from launch.environment import look
from launch.spec import Cluster, closest
from launch.spec.slurm import seconds_of_limit

_PROBE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from launch.backends.slurm.probe import main; main(sys.argv[2])"
)
_PROBE_MINUTES = 10
_ASK_SECONDS = 1.0
_LISTED = 4  # So many nodes are named.
_SETTLE_SECONDS = 5.0  # How long files may take to be seen here.


def findings(cluster: Cluster, folder: Path, wait_seconds: float) -> Iterator[Finding]:
    """Look at a SLURM cluster.

    Args:
      cluster: what will be asked of it.
      folder: where run directories will be.
      wait_seconds: how long the small job may wait for its nodes.
    """
    missing = [name for name in ("sbatch", "srun", "scontrol") if not shutil.which(name)]
    if missing:
        advice = "Start from a login node, or load SLURM's module"
        yield Finding("SLURM", "looked on the PATH", f"no {', no '.join(missing)}", False, advice)
        return
    ping = command.run(["scontrol", "ping"], timeout_seconds=client.QUICK_SECONDS)
    up = ping.ok and " UP" in ping.out
    said = " ".join(ping.out.split()) or ping.last_word
    advice = "" if up else "Ask the administrators; nothing can be submitted now"
    yield Finding("SLURM", "scontrol ping", said, up, advice)
    if not up:
        return
    yield from _partition(cluster)
    with tempfile.TemporaryDirectory(prefix=".muster-doctor-", dir=_above(folder)) as name:
        yield writable(folder)
        yield from _nodes(cluster, Path(name), wait_seconds)


def _above(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _partition(cluster: Cluster) -> Iterator[Finding]:
    shown = command.run(
        ["scontrol", "--oneliner", "show", "partition"], timeout_seconds=client.QUICK_SECONDS
    )
    known = {}
    for line in shown.out.splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        known[words.get("PartitionName", "")] = words
    name = cluster.slurm.partition
    if name is None:
        name = next((n for n, words in known.items() if words.get("Default") == "YES"), None)
        if name is None:
            found = f"no default one; there are {', '.join(sorted(known))}"
            advice = "Set --cluster.slurm.partition"
            yield Finding("partition", "asked for the default", found, False, advice)
            return
    tried = f"asked for {name}"
    if name not in known:
        advice = f"Set --cluster.slurm.partition; {closest(name, known)}"
        yield Finding("partition", tried, "there is none", False, advice)
        return
    words = known[name]
    problems = _limits(cluster, words)
    state = words.get("State", "?")
    if state != "UP":
        problems.append(f"it is {state}")
    limits = (
        f"{state}, {words.get('TotalNodes')} nodes, at most {words.get('MaxNodes')} for "
        f"{words.get('MaxTime')}"
    )
    found = "; ".join(problems) or limits
    advice = "Ask for less, or for another partition" if problems else ""
    yield Finding("partition", tried, found, not problems, advice)


def _limits(cluster: Cluster, words: Mapping[str, str]) -> list[str]:
    """What is asked for and the partition does not give."""
    problems = []
    for what in ("MaxNodes", "TotalNodes"):
        most = words.get(what, "")
        if most.isdigit() and int(most) < cluster.hosts:
            problems.append(f"hosts={cluster.hosts}, and its {what} is {most}")
    most_seconds = seconds_of_limit(words.get("MaxTime", ""))
    wanted = cluster.slurm.time_limit_seconds
    if wanted is not None and most_seconds is not None and wanted > most_seconds:
        problems.append(f"time={cluster.slurm.time!r}, and its MaxTime is {words['MaxTime']}")
    return problems


def _nodes(cluster: Cluster, folder: Path, wait_seconds: float) -> Iterator[Finding]:
    """What a job of this shape finds on its nodes."""
    token = os.urandom(8).hex()
    env = {**step.device_env(cluster), **dict(cluster.env)}
    plan = {"token": token, "python": step.agent_python(cluster), "env": env}
    (folder / probe.PLAN).write_text(json.dumps(plan))
    spec = script.JobSpec(folder, Path.cwd(), sys.executable, "muster:doctor", 60.0)
    options = step.options(cluster, cluster.hosts, folder)
    words = ["srun", *options, step.agent_python(cluster), "-c", _PROBE, str(ROOT), str(folder)]
    file = folder / "job.sh"
    file.write_text(script.render(cluster, spec, words, minutes=_PROBE_MINUTES))
    test = command.run(["sbatch", "--test-only", str(file)], timeout_seconds=client.SUBMIT_SECONDS)
    said = re.sub(r"sbatch: (error: )?", "", " ".join(test.err.split()))
    yield Finding("shape", "sbatch --test-only", said, test.ok, "" if test.ok else "Ask for less")
    if not test.ok:
        return
    submitted = command.run(
        ["sbatch", "--parsable", str(file)], timeout_seconds=client.SUBMIT_SECONDS
    )
    if not submitted.ok:
        yield Finding("probe", "sbatch", submitted.last_word, False, "See above")
        return
    job_id = submitted.out.strip().partition(";")[0]
    try:
        job = _wait_for(job_id, wait_seconds)
    finally:
        client.cancel(job_id)
    yield from _look_at(cluster, folder, job_id, job)


def _wait_for(job_id: str, wait_seconds: float) -> client.Job | None:
    """Wait until the job has ended, or has waited too long for its nodes; its last state."""
    waited_until = time.monotonic() + wait_seconds
    job = None
    while True:
        try:
            job = client.job(job_id) or job
        except client.UnavailableError:
            if time.monotonic() > waited_until:
                return job
        if job is not None and not job.active:
            return job
        if job is not None and job.state == "PENDING" and time.monotonic() > waited_until:
            return job
        time.sleep(_ASK_SECONDS)


def _look_at(
    cluster: Cluster, folder: Path, job_id: str, job: client.Job | None
) -> Iterator[Finding]:
    tried = f"job {job_id} on {cluster.hosts} nodes"
    if job is not None and job.state == "PENDING":
        advice = "Look again later, or give --wait=SECONDS"
        yield Finding("nodes", tried, f"still waiting: {job.reason}", None, advice)
        return
    reports = _reports(folder, cluster.hosts)
    log = folder / "controller.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    if len(reports) < cluster.hosts:
        found = f"{len(reports)} of {cluster.hosts} nodes wrote into {folder}"
        if lines:
            found += f"; the job said: {lines[-1]}"
        advice = "The run directory must be on a file system that all nodes share and may write"
        yield Finding("shared directory", tried, found, False, advice)
    else:
        names = ", ".join(sorted(reports)[:4]) + (", ..." if len(reports) > 4 else "")
        yield Finding("shared directory", tried, f"seen and written by {names}")
    yield from _on_nodes(cluster, reports)


def _reports(folder: Path, wanted: int) -> dict[str, dict[str, Any]]:
    limit = time.monotonic() + _SETTLE_SECONDS
    while True:
        os.listdir(folder)  # A network file system then looks anew.
        files = list(folder.glob("node-*.json"))
        if len(files) >= wanted or time.monotonic() > limit:
            reports = [json.loads(file.read_text()) for file in files]
            return {report["node"]: report for report in reports}
        time.sleep(0.2)


def _on_nodes(cluster: Cluster, reports: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    here = look(sys.executable, {"JAX_PLATFORMS": "cpu"})
    wanted = here.get("versions") if cluster.slurm.container is None else None
    devices = cluster.devices_per_process
    if cluster.slurm.gpus is not None and cluster.env.get("JAX_PLATFORMS") != "cpu":
        devices = cluster.slurm.gpus
    versions = wanted if isinstance(wanted, Mapping) else None
    for nodes, found in _alike(reports, "environment"):
        if found is not None:
            yield from environment_findings(nodes, found, versions, devices)
    for nodes, seen in _alike(reports, "visible"):
        if cluster.slurm.gpus is not None:
            yield _gpus(cluster.slurm.gpus, nodes, seen or {})
    wrong = {node: report["met"] for node, report in reports.items() if report.get("met")}
    if len(reports) < 2:
        yield Finding("network", "no second node to talk to", "not tried", None)
        return
    said = "; ".join(f"{node}: {why}" for node, why in sorted(wrong.items()))
    advice = "Open the ports between nodes to one another" if wrong else ""
    yield Finding(
        "network", "each node talked to the first over a port", said or "heard", not wrong, advice
    )


def _alike(
    reports: Mapping[str, Mapping[str, Any]], field: str
) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """What nodes say, and which of them say the same, in words."""
    groups: dict[str, list[str]] = {}
    for node, report in sorted(reports.items()):
        groups.setdefault(json.dumps(report.get(field), sort_keys=True), []).append(node)
    for said, nodes in groups.items():
        rest = len(nodes) - _LISTED
        more = f" and {rest} others" if rest > 0 else ""
        yield ", ".join(nodes[:_LISTED]) + more, json.loads(said)


def _gpus(wanted: int, nodes: str, visible: Mapping[str, Any]) -> Finding:
    seen = visible.get("CUDA_VISIBLE_DEVICES") or ""
    ok = len([one for one in seen.split(",") if one]) == wanted
    advice = "" if ok else f"The config asks for {wanted}; see gpus_per_node and gres"
    return Finding("GPUs", f"CUDA_VISIBLE_DEVICES on {nodes}", repr(seen), ok, advice)
