"""The section `tpu` of a cluster config: what is asked of Google Cloud."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from launch.errors import ConfigError, closest
from launch.spec.fields import require

WAYS = ("queued", "direct")
PROVISIONING = ("on_demand", "spot", "reserved")

_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
_PROJECT = re.compile(r"([a-z][a-z0-9.]*:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")
_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
_OUR_LABELS = "muster"
MIN_POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class TpuSpec:
    """What is asked of Google Cloud, and what the TPU VMs get. None leaves it to gcloud.

    Attributes:
      project: None for the one that gcloud is set to.
      zones: to be tried in turn; one at least.
      way: `queued` asks by queued resources, `direct` creates TPU VMs at once or not at all.
      provisioning: `on_demand`, `spot` or `reserved`.
      nodes: names of TPU VMs that are there already, one a slice: used, and never deleted.
      runtime_version: of the VMs; None for the generation's.
      network, subnetwork, service_account: of the VMs.
      internal_ips: no external addresses; the controller must then be in the network.
      tags: network tags.
      labels: labels of one's own.
      queue_seconds: how long a queued resource may wait in one zone, if there are others to try;
        with one zone, after which the run gives up. None for ever.
      keep: the machines stay when the run has ended.
      max_lifetime_seconds: after so long from the first request for machines on they are given
        back, whatever the run does: by the controller, or from the inside if there is none.
      idle_seconds: processes that have ended, and of which no controller hears, give their machine
        back from the inside after this.
      poll_seconds: between two looks at the nodes' states.
      silent_seconds: how long a host may be out of reach, with its node in order, before it is
        given up.
      storage: where checkpoints and metrics go: `gs://BUCKET/DIRECTORY`, or a directory that all
        hosts see. Each run gets a directory of its own there. None if --workdir is on gs://, or if
        the program keeps nothing.
      send_code: whether the current directory's files go to the hosts, and the program runs there.
      max_file_bytes: a larger file is refused.
      python: the interpreter on the VMs, from which an environment is made.
      packages: what pip installs into it; none to use the interpreter as it is.
      constraints: the file that pins them, in the code.
      container: an image to run in; None for none.
      container_python: the interpreter in the image.
      ssh_user: the user's name on the VMs; None for the one that gcloud takes.
      price_per_chip_hour: in the currency that you think in; shown in `status`, nothing else.
    """

    project: str | None = None
    zones: tuple[str, ...] = ()
    way: str = "queued"
    provisioning: str = "on_demand"
    nodes: tuple[str, ...] = ()
    runtime_version: str | None = None
    network: str | None = None
    subnetwork: str | None = None
    service_account: str | None = None
    internal_ips: bool = False
    tags: tuple[str, ...] = ()
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    queue_seconds: float | None = None
    keep: bool = False
    max_lifetime_seconds: float = 7 * 86400.0
    idle_seconds: float = 1800.0
    poll_seconds: float = 10.0
    silent_seconds: float = 120.0
    storage: str | None = None
    send_code: bool = True
    max_file_bytes: int = 10 << 20
    python: str = "python3"
    packages: tuple[str, ...] = ()
    constraints: str | None = None
    container: str | None = None
    container_python: str = "python3"
    ssh_user: str | None = None
    price_per_chip_hour: float | None = None

    def __post_init__(self) -> None:
        for name, value in self._texts():
            require(bool(value), name, value, "is empty; leave it out or set it to None")
            require(value.isprintable(), name, value, "must be one line of printable characters")
        for name, known in (("way", WAYS), ("provisioning", PROVISIONING)):
            if getattr(self, name) not in known:
                raise ConfigError(name, closest(getattr(self, name), known), getattr(self, name))
        for zone in self.zones:
            rule = "is no zone; zones look like us-west4-a"
            require(bool(_ZONE.fullmatch(zone)), "zones", zone, rule)
        rule = "is no project id, like my-project-12"
        require(
            self.project is None or bool(_PROJECT.fullmatch(self.project)),
            "project",
            self.project,
            rule,
        )
        self._check_numbers()
        self._check_labels()
        if self.storage is not None:
            rule = "must be gs://BUCKET/DIRECTORY, or an absolute path that all hosts see"
            ok = re.fullmatch(r"gs://[^/]+(/.*)?|/.*", self.storage)
            require(bool(ok), "storage", self.storage, rule)
        rule = "pins packages, and there are none"
        require(
            self.constraints is None or bool(self.packages), "constraints", self.constraints, rule
        )
        rule = f"installs into an environment, and container={self.container!r} has its own"
        require(not (self.container and self.packages), "packages", self.packages, rule)

    def _texts(self) -> Iterable[tuple[str, str]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    yield field.name, text

    def _check_numbers(self) -> None:
        for name in ("max_lifetime_seconds", "idle_seconds", "silent_seconds"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        for name in ("queue_seconds", "price_per_chip_hour"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be above 0, or None")
        least = f"must be at least {MIN_POLL_SECONDS:g}"
        require(self.poll_seconds >= MIN_POLL_SECONDS, "poll_seconds", self.poll_seconds, least)
        require(self.max_file_bytes > 0, "max_file_bytes", self.max_file_bytes, "must be above 0")

    def _check_labels(self) -> None:
        for name, value in self.labels.items():
            rule = "lower-case letters, digits, - and _, at most 63, and a letter first"
            require(bool(_LABEL.fullmatch(name)), f"labels.{name}", value, f"names are {rule}")
            ok = isinstance(value, str) and bool(_LABEL_VALUE.fullmatch(value))
            rule = "must be a string of lower-case letters, digits, - and _, at most 63"
            require(ok, f"labels.{name}", value, rule)
            rule = "is Muster's own, by which it finds its machines again; take another name"
            require(not name.startswith(_OUR_LABELS), f"labels.{name}", value, rule)
