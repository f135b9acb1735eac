"""Other topologies that a run can go on upon, made from the one it was started on. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from launch.request import check_config
from launch.spec import Cluster, ConfigError, closest, cluster_spec, load_config, train_spec

NAMES = ("fewer", "more", "mesh")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Another way to run the same config.

    Attributes:
      name: `fewer`, `more` (processes) or `mesh`.
      text: what it is.
      words: overrides that make it.
      impossible: why it cannot be; "" if it can.
    """

    name: str
    text: str
    words: tuple[str, ...] = ()
    impossible: str = ""


def parse(text: str | None) -> list[str]:
    """The names of `--topologies=NAME,...`; all of them by default, none for `none`."""
    if text is None:
        return list(NAMES)
    if text == "none":
        return []
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise ConfigError("--topologies", f"there is no {name!r}; {closest(name, NAMES)}", text)
    return names


def others(
    names: list[str], words: tuple[str, ...], config: Any, cluster: Cluster
) -> list[Topology]:
    """The other topologies, each possible or with the reason why it is not.

    Args:
      names: of those wanted.
      words: `--config=FILE`, `--cluster=FILE` and their overrides.
      config, cluster: what these make.
    """
    makers: dict[str, Callable[[], Topology]] = {
        "fewer": lambda: _first(words, "fewer", _fewer(cluster), "it has one process"),
        "more": lambda: _first(words, "more", _more(cluster), ""),
        "mesh": lambda: _mesh(words, config, cluster),
    }
    return [makers[name]() for name in names]


def _fewer(cluster: Cluster) -> Iterator[tuple[str, dict[str, int]]]:
    each, hosts, devices = (
        cluster.processes_per_host,
        cluster.hosts,
        cluster.devices_per_process,
    )
    if each > 1:
        yield "", {"processes_per_host": each // 2}
        yield "", {"processes_per_host": each // 2, "devices_per_process": devices * 2}
    elif hosts > 1:
        yield "", {"hosts": hosts // 2}
        yield "", {"hosts": hosts // 2, "devices_per_process": devices * 2}


def _more(cluster: Cluster) -> Iterator[tuple[str, dict[str, int]]]:
    each, devices = cluster.processes_per_host, cluster.devices_per_process
    yield "", {"processes_per_host": each * 2}
    if devices > 1:
        yield "", {"processes_per_host": each * 2, "devices_per_process": devices // 2}


def _first(
    words: tuple[str, ...],
    name: str,
    ways: Iterator[tuple[str, dict[str, int]]],
    reason: str,
) -> Topology:
    """The first way that config and cluster allow."""
    text = f"{name} processes"
    for _, fields in ways:
        own = tuple(f"--cluster.{field}={value}" for field, value in fields.items())
        try:
            cluster = _check((*words, *own))
        except ConfigError as error:
            reason = reason or str(error)
            continue
        count, devices = cluster.num_processes, cluster.num_devices
        text = f"{count} process{'es' * (count > 1)} of {devices // count} "
        text += f"device{'s' * (devices > count)}"
        return Topology(name, text, own)
    return Topology(name, text, impossible=reason)


def _mesh(words: tuple[str, ...], config: Any, cluster: Cluster) -> Topology:
    """`data` and `fsdp` change places."""
    mesh = train_spec(config, cluster.num_devices).mesh
    data, fsdp = mesh.fsdp, mesh.data
    if data == fsdp:
        data, fsdp = data * fsdp, 1
    text = f"a mesh of data={data}, fsdp={fsdp}, in the place of data={mesh.data}, fsdp={mesh.fsdp}"
    if mesh.data * mesh.fsdp == 1:
        return Topology("mesh", "another mesh", impossible="data and fsdp are both 1")
    # One that is -1 in the file must not be the second for a moment.
    own = (f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}")
    try:
        _check((*words, *own))
    except ConfigError as error:
        return Topology("mesh", text, impossible=str(error))
    return Topology("mesh", text, own)


def _check(words: tuple[str, ...]) -> Cluster:
    """What `muster run` would refuse, refused here."""
    from_cluster = load_config("cluster", words)
    cluster = cluster_spec(from_cluster.config)
    check_config(load_config("config", from_cluster.rest).config, cluster)
    return cluster
