"""What Google's TPU service would hold: nodes, queued resources and operations.

Every change of state that takes time has a thread of its own. `lock` guards all state; `_power`
orders boots and power cuts of VMs, which take long, and is never taken while `lock` is held.
"""

from __future__ import annotations

import datetime
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

from launch import topology
from launch.errors import ConfigError

Json = dict[str, Any]
Key = tuple[str, str]  # zone, name

_QUOTA = (
    "Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. "
    "Limit: {limit} in zone {zone}."
)
_TICK_SECONDS = 0.01


class ApiError(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, code: str, message: str, reason: str | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.reason = reason


class TpuState:
    """The service's state; its attributes without an underscore are for tests to read and set."""

    def __init__(self, addresses: Sequence[str], project: str):
        self.project = project
        self.lock = threading.RLock()
        self.nodes: dict[Key, Json] = {}
        self.queued: dict[Key, Json] = {}
        self.operations: dict[str, Json] = {}
        self.zones = {"us-west4-a", "us-east5-b"}
        # How long a node is CREATING, and a queued resource on its way to ACTIVE.
        self.provision_seconds = 0.05
        self.hold = False  # While True the queue is full: nothing is provisioned.
        self.quota: int | None = None  # Chips in each zone.
        self.stockout_zones: set[str] = set()
        self.project_ssh_keys = ""
        self.host_keys: dict[str, str] = {}  # address -> public key as in an id_ed25519.pub
        self.on_boot: Callable[[str, list[str]], None] | None = None
        self.on_down: Callable[[str, list[str]], None] | None = None
        self.on_keys: Callable[[str, list[str], str], None] | None = None
        self._free = list(addresses)
        self._held: dict[Key, list[str]] = {}  # Addresses of nodes that have VMs.
        self._power = threading.Lock()
        self._ended = threading.Event()
        self._operation_errors: list[tuple[str, Json, bool]] = []

    def operation_error(
        self, pattern: str, code: int, message: str, half_made: bool = False
    ) -> None:
        """Let the next creation of something with such a name end with this error.

        Args:
          pattern: a regular expression that is searched in names.
          code: of google.rpc.Code, e.g. 8 for RESOURCE_EXHAUSTED.
          message: text.
          half_made: the thing stays CREATING for ever; otherwise it is gone.
        """
        with self.lock:
            self._operation_errors.append((pattern, {"code": code, "message": message}, half_made))

    def owned(self, label: str, value: str) -> list[str]:
        """Names of what exists with this label."""
        with self.lock:
            found = [name for (_, name), node in self.nodes.items()
                     if node.get("labels", {}).get(label) == value]  # fmt: skip
            for (_, name), queued in self.queued.items():
                specs = [spec.get("node", {}) for spec in queued["tpu"]["nodeSpec"]]
                if any(node.get("labels", {}).get(label) == value for node in specs):
                    found.append(name)
            return found

    def operation(self, zone: str, target: str, verb: str) -> Json:
        """A new operation, not done."""
        name = (
            f"projects/{self.project}/locations/{zone}/operations/operation-{secrets.token_hex(8)}"
        )
        operation = {
            "name": name,
            "done": False,
            "metadata": {"createTime": now(), "target": target, "verb": verb},
        }
        with self.lock:
            self.operations[name] = operation
        return operation

    def _finish(
        self, operation: Json, response: Json | None = None, error: Json | None = None
    ) -> None:
        with self.lock:
            operation["done"] = True
            operation.update({"error": error} if error else {"response": response})

    def _take_error(self, name: str) -> tuple[Json | None, bool]:
        with self.lock:
            for i, (pattern, error, half_made) in enumerate(self._operation_errors):
                if re.search(pattern, name):
                    del self._operation_errors[i]
                    return error, half_made
        return None, False

    def _check_new(self, there: dict[Key, Json], key: Key, kind: str) -> None:
        if key in there:
            name = f"projects/{self.project}/locations/{key[0]}/{kind}/{key[1]}"
            raise ApiError(409, "ALREADY_EXISTS", f"Resource '{name}' already exists")

    def _check_quota(self, zone: str, chips: int) -> None:
        """SUSPENDED and FAILED queued resources count too, until they are deleted."""
        used = sum(accelerator_of(node, zone).chips for key, node in self.nodes.items()
                   if key[0] == zone and "queuedResource" not in node)  # fmt: skip
        used += sum(chips_of(spec, zone) for key, queued in self.queued.items()
                    if key[0] == zone for spec in queued["tpu"]["nodeSpec"])  # fmt: skip
        if self.quota is not None and used + chips > self.quota:
            message = _QUOTA.format(limit=self.quota, zone=zone)
            raise ApiError(429, "RESOURCE_EXHAUSTED", message)

    def _key(self, there: dict[Key, Json], name: str) -> Key:
        found = [key for key in there if key[1] == name]
        if not found:
            raise KeyError(name)
        return found[0]

    def _start(self, function: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        return thread

    def _pass_time(self, seconds: float, going: Callable[[], bool]) -> bool:
        """Wait; False when all has ended, or what is waited for is not so any more."""
        return not self._ended.wait(max(seconds, _TICK_SECONDS)) and going()


def chips_of(spec: Json, zone: str) -> int:
    """Chips of all the nodes of a spec; one that has its node's name stands for that only."""
    several = spec.get("multisliceParams") or spec.get("multiNodeParams") or {}
    count = 1 if "nodeId" in spec else several.get("nodeCount", 1)
    return count * accelerator_of(spec["node"], zone).chips


def accelerator_of(node: Json, zone: str) -> topology.Accelerator:
    """The accelerator of a node as it is asked for."""
    name = str(node.get("acceleratorType", "")).rpartition("/")[2]
    try:
        return topology.accelerator(name)
    except ConfigError:
        message = f'Accelerator type "{name}" is not available in zone "{zone}"'
        raise ApiError(400, "INVALID_ARGUMENT", message) from None


def now() -> str:
    """The time as the service writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
