"""`muster doctor` on TPUs: asks gcloud and the API, and tries the machines that are there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from launch import command
from launch.backends.tpu import gcloud
from launch.backends.tpu.gcloud import GcloudError
from launch.backends.tpu.nodes import DEAD, list_nodes, list_queued
from launch.backends.tpu.prepare import HOST_PYTHON, try_storage
from launch.backends.tpu.reach import SshError, hosts_of
from launch.backends.tpu.ssh import HostFailedError, Session
from launch.doctor import Finding, writable
from launch.spec import Cluster, ConfigError, closest

_KEY = "~/.ssh/google_compute_engine"
_QUOTA_SECONDS = 60.0


def findings(cluster: Cluster, folder: Path) -> Iterator[Finding]:
    """Look at Google Cloud, as far as it can be done without paying for a machine.

    Args:
      cluster: what will be asked of it.
      folder: where run directories will be.
    """
    try:
        gcloud.check_installed()
    except ConfigError as error:
        yield Finding("gcloud", "looked on the PATH", str(error), False)
        return
    yield writable(folder)
    try:
        versions = gcloud.run(["gcloud", "version", "--format=json"])
        settings = gcloud.run(["gcloud", "config", "list", "--all", "--format=json"])
    except GcloudError as error:
        yield Finding("gcloud", "asked for its settings", error.said, False, error.advice)
        return
    version = str(versions.get("Google Cloud SDK", "?"))
    yield Finding("gcloud", "gcloud version", version)
    account = (settings.get("core") or {}).get("account")
    advice = "" if account else "gcloud auth login"
    yield Finding("account", "gcloud config list", str(account), bool(account), advice)
    project = cluster.tpu.project or (settings.get("core") or {}).get("project")
    advice = "" if project else "gcloud config set project PROJECT, or set tpu.project"
    yield Finding("project", "the config's, or gcloud's", str(project), bool(project), advice)
    if not project:
        return
    for zone in cluster.tpu.zones:
        yield from _zone(cluster, zone)
    yield _quota(str(project))
    yield _key()
    yield from _machines(cluster)


def _zone(cluster: Cluster, zone: str) -> Iterator[Finding]:
    """Whether the zone is there, the API on, and we let in; the accelerator; what is held."""
    project = cluster.tpu.project
    try:
        nodes, queued = list_nodes(project, zone), list_queued(project, zone)
    except GcloudError as error:
        yield Finding(f"zone {zone}", "asked for its nodes", error.said, False, error.advice)
        return
    dead = sorted(one.name for one in queued.values() if one.state in DEAD)
    text = f"{len(nodes)} nodes, {len(queued)} queued resources"
    if dead:
        text += f"; {', '.join(dead)} will give nothing any more and count against the quota"
    advice = "`muster gc` deletes those that are Muster's" if dead else ""
    yield Finding(f"zone {zone}", "asked for its nodes", text, advice=advice)
    argv = ["gcloud", "compute", "tpus", "accelerator-types", "list", f"--zone={zone}"]
    argv += [*([] if project is None else [f"--project={project}"]), *gcloud.ALWAYS]
    wanted = str(cluster.accelerator)
    try:
        known = {str(one.get("type") or one["name"].rpartition("/")[2]) for one in gcloud.run(argv)}
    except GcloudError as error:
        yield Finding("accelerator", f"asked {zone} for {wanted}", error.said, False, error.advice)
        return
    there = wanted in known
    text = "it is there" if there else f"there is none; {closest(wanted, known)}"
    advice = "" if there else "Take another zone or another type"
    yield Finding("accelerator", f"asked {zone} for {wanted}", text, there, advice)


def _quota(project: str) -> Finding:
    """What the project may have, where gcloud can say it; its names are shown as they come."""
    argv = ["gcloud", "alpha", "services", "quota", "list", "--service=tpu.googleapis.com"]
    tried = "gcloud alpha services quota list"
    try:
        found = gcloud.run(
            [*argv, f"--consumer=projects/{project}", *gcloud.ALWAYS],
            timeout_seconds=_QUOTA_SECONDS,
        )
    except GcloudError as error:
        advice = "Look at console.cloud.google.com/iam-admin/quotas"
        return Finding("quota", tried, error.said, None, advice)
    limits = []
    for metric in found or []:
        for limit in metric.get("consumerQuotaLimits") or []:
            for bucket in limit.get("quotaBuckets") or []:
                where = (bucket.get("dimensions") or {}).get("zone", "anywhere")
                limits.append(f"{metric.get('displayName')} in {where}: "
                              f"{bucket.get('effectiveLimit')}")  # fmt: skip
    return Finding("quota", tried, "; ".join(limits[:12]) or "it names none", None)


def _key() -> Finding:
    """Whether ssh can use gcloud's key without anybody at the keyboard."""
    path = Path(_KEY).expanduser()
    if not path.exists():
        return Finding("ssh key", f"looked for {_KEY}", "there is none yet: gcloud makes one")
    done = command.run(["ssh-keygen", "-y", "-P", "", "-f", str(path)], timeout_seconds=10)
    advice = "" if done.ok else "Take the passphrase off (ssh-keygen -p), or use an ssh agent"
    text = "it can be used" if done.ok else done.last_word
    agent = bool(os.environ.get("SSH_AUTH_SOCK"))
    return Finding("ssh key", f"opened {_KEY}", text, done.ok or (None if agent else False), advice)


def _machines(cluster: Cluster) -> Iterator[Finding]:
    """The first machine, where there is one: ssh, Python, storage."""
    what = cluster.tpu.storage or "no tpu.storage"
    if not cluster.tpu.nodes:
        text = "there is no machine yet; `muster run` tries it on the first, before it trains"
        yield Finding("storage", f"{what}, from a TPU VM", text, None)
        return
    zone, name = cluster.tpu.zones[0], cluster.tpu.nodes[0]
    try:
        node = list_nodes(cluster.tpu.project, zone).get(name)
        if node is None or not node.addresses:
            yield Finding("machines", f"looked for {name}", "there is none", False)
            return
        session = Session(hosts_of(cluster, zone, node, 0)[0], HOST_PYTHON)
    except (GcloudError, SshError) as error:
        yield Finding("machines", f"ssh to {name}", str(error), False)
        return
    began = time.monotonic()
    try:
        hello = session.call("hello", run="doctor")
        took = time.monotonic() - began
        text = f"Python {hello['python']} on {hello['hostname']}, {hello['free_bytes'] >> 30} GiB "
        yield Finding("machines", f"ssh to {name}", f"{text}free, after {took:.1f} s")
        if cluster.tpu.storage is not None:
            try_storage(session, cluster)
            yield Finding("storage", f"{what}, from {name}", "it can be written")
    except (SshError, HostFailedError) as error:
        yield Finding("machines", f"commands on {name}", str(error), False)
    finally:
        session.close()
