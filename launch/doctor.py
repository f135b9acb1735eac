"""`muster doctor`: can this cluster run a gang? Says what was tried, what was found, what to do."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from launch import contract
from launch.backends.local import reserve_port
from launch.environment import look
from launch.spec import Cluster, ConfigError, cluster_spec, load_config


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      what: in two or three words.
      tried: how.
      found: the answer.
      ok: whether it is as it should be; None when it could not be tried.
      advice: what to do; "" when all is well.
    """

    what: str
    tried: str
    found: str
    ok: bool | None = True
    advice: str = ""


def doctor(arguments: Sequence[str], flags: Mapping[str, str]) -> int:
    """Look at a cluster, and print what was found as it comes.

    Args:
      arguments: `--cluster` and its overrides.
      flags: the other flags that were given: workdir, wait.

    Returns:
      EXIT_DONE if all is well, else EXIT_FAILED.
    """
    loaded = load_config("cluster", arguments)
    if loaded.rest:
        raise ConfigError("", f"muster doctor takes no argument; got {list(loaded.rest)}")
    cluster = cluster_spec(loaded.config)
    wait = flags.get("wait", "300")
    if not wait.isdigit():
        raise ConfigError("--wait", "must be a number of seconds", wait)
    folder = Path(flags.get("workdir", ".")).expanduser().absolute()
    return _print(_findings(cluster, folder, float(wait)))


def _findings(cluster: Cluster, folder: Path, wait_seconds: float) -> Iterator[Finding]:
    if cluster.backend == "slurm":
        from launch.backends.slurm.doctor import findings

        yield from findings(cluster, folder, wait_seconds)
    elif cluster.backend == "tpu":
        from launch.backends.tpu.doctor import findings as tpu_findings

        yield from tpu_findings(cluster, folder)
    else:
        yield from _local(cluster, folder)


def _print(findings: Iterable[Finding]) -> int:
    width = max(60, shutil.get_terminal_size().columns if sys.stdout.isatty() else 100)
    bad = 0
    for finding in findings:
        mark = {True: "ok", False: "FAIL", None: "?"}[finding.ok]
        bad += finding.ok is False
        text = f"{finding.what}: {finding.tried}: {finding.found}"
        if finding.advice:
            text += f". {finding.advice}"
        for line in textwrap.wrap(
            text,
            width,
            initial_indent=f"{mark:5}",
            subsequent_indent=" " * 5,
            break_long_words=False,
            break_on_hyphens=False,
        ):
            print(line)
        sys.stdout.flush()
    print(f"{bad} of these must be mended" if bad else "nothing stands against a gang")
    return contract.EXIT_FAILED if bad else contract.EXIT_DONE


def _local(cluster: Cluster, folder: Path) -> Iterator[Finding]:
    from launch.backends.host_plan import cpu_env

    cores = len(os.sched_getaffinity(0))
    number = cluster.num_processes
    yield Finding(
        "cores",
        f"counted, for {number} processes",
        str(cores),
        advice="" if cores >= number else "It will be slow, and not fail",
    )
    yield writable(folder)
    with reserve_port() as reservation:
        port = reservation.getsockname()[1]
        yield Finding("port", "asked for one on loopback", str(port))
    found = look(sys.executable, {**cpu_env(cluster), **dict(cluster.env)})
    yield from environment_findings("this machine", found, None, cluster.devices_per_process)


def writable(folder: Path) -> Finding:
    """Whether a run directory can be made here."""
    above = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".muster-doctor-", dir=above):
            return Finding("run directory", f"wrote below {above}", "it can be written")
    except OSError as error:
        advice = "Give another --workdir"
        return Finding("run directory", f"wrote below {above}", str(error), False, advice)


def environment_findings(
    where: str,
    found: Mapping[str, object],
    wanted: Mapping[str, object] | None,
    devices: int | None,
) -> Iterator[Finding]:
    """What `environment.look` says of one machine.

    Args:
      where: the machine, in words.
      found: by `environment.look` there.
      wanted: versions of packages that it should have; None for any.
      devices: how many devices JAX should find; None for any.
    """
    if "error" in found:
        yield Finding(
            "environment",
            f"imported jax on {where}",
            str(found["error"]),
            False,
            "Install Muster there, or set up what it needs by `setup`, `modules` or a container",
        )
        return
    versions = found["versions"]
    assert isinstance(versions, Mapping)
    missing = sorted(name for name, version in versions.items() if version is None)
    differ = sorted(
        f"{name} {versions[name]} and here {version}"
        for name, version in (wanted or {}).items()
        if version is not None and versions.get(name) not in (None, version)
    )
    bad = ", ".join([*(f"{name} is missing" for name in missing), *differ])
    yield Finding(
        "environment",
        f"imported jax on {where}",
        bad or f"Python {found['python']}, jax {versions['jax']}, all that the trainer needs",
        not bad,
        "All machines must have the same; see constraints.txt" if bad else "",
    )
    seen = found["devices"]
    assert isinstance(seen, list)
    wrong = devices is not None and len(seen) != devices
    kinds = ", ".join(seen[:2]) + (", ..." if len(seen) > 2 else "")
    yield Finding(
        "devices",
        f"asked JAX on {where}",
        f"{len(seen)} ({kinds})",
        not wrong,
        f"The config promises {devices}; see what hides or adds devices" if wrong else "",
    )
