"""The methods of the fake TPU API: what a request does, and what it is answered."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from tests.testing.tpu_api_queued import TpuQueue
from tests.testing.tpu_api_state import ApiError, Json, Key

# `gcloud compute tpus locations` and `accelerator-types` ask v1.
_PATH = re.compile(
    r"/v(?:1|2|2alpha1)/projects/(?P<project>[^/]+)/locations"
    r"(?:/(?P<zone>[^/:]+)(?:/(?P<kind>\w+)(?:/(?P<name>[^/:]+)(?::(?P<verb>\w+))?)?)?)?"
)
_TYPES = [
    f"{family}-{size}"
    for family, sizes in {
        "v4": (8, 16, 32),
        "v5litepod": (1, 4, 8, 16, 32, 64),
        "v5p": (8, 16, 32),
        "v6e": (1, 4, 8, 16, 32, 64),
    }.items()
    for size in sizes
]
_PERMISSIONS = {"nodes": "nodes", "queuedResources": "queuedresources"}
_DISABLED = (
    "Cloud TPU API has not been used in project {project} before or it is disabled. Enable it by "
    "visiting https://console.developers.google.com/apis/api/tpu.googleapis.com/overview?"
    "project={project} then retry. If you enabled this API recently, wait a few minutes for the "
    "action to propagate to our systems and retry."
)


@dataclasses.dataclass
class Request:
    """A request that the server was asked.

    Attributes:
      index: its place in `TpuApi.requests`.
      method: e.g. GET.
      path: without the query.
      query: decoded.
      body: decoded, or None.
      user_agent: has the gcloud command in it.
      status: HTTP status of the answer; 0 before that, and where there was none.
    """

    index: int
    method: str
    path: str
    query: dict[str, str]
    body: Any
    user_agent: str
    status: int = 0

    @property
    def changes(self) -> bool:
        """Whether it asks for a change."""
        return self.method != "GET" and "getGuestAttributes" not in self.path

    @property
    def command(self) -> str:
        """Which run of gcloud has sent it; "" for other programs."""
        return self.user_agent.partition("invocation-id/")[2].partition(" ")[0]


class TpuMethods(TpuQueue):
    """The service with its methods."""

    def __init__(self, addresses: Sequence[str], project: str):
        super().__init__(addresses, project)
        self.forbidden = False  # Nothing is allowed.
        self.disabled = False  # The project does not use the TPU API.
        self.page_size = 500  # The longest page of a list.

    def do(self, request: Request) -> Any:
        """Let a request take effect; its answer.

        Raises:
          ApiError: it is refused.
        """
        if self.forbidden:
            raise ApiError(403, "PERMISSION_DENIED", "The caller does not have permission")
        match = _PATH.fullmatch(request.path)
        if not match:
            return self._other(request)
        if self.disabled:
            message = _DISABLED.format(project=self.project)
            raise ApiError(403, "PERMISSION_DENIED", message, reason="SERVICE_DISABLED")
        kind, key = match["kind"] or "locations", (match["zone"] or "-", match["name"] or "")
        action = match["verb"] or _action(request, match)
        where = match[0].split("/", 2)[2]
        allowed = key[0] in self.zones or (key[0] == "-" and action == "list")
        if match["project"] != self.project or not allowed:
            on = where if key[1] else where.removesuffix(f"/{kind}")
            message = f"Permission 'tpu.{kind.lower()}.{action}' denied on '{on}'"
            raise ApiError(403, "PERMISSION_DENIED", f"{message} (or it may not exist).")
        method = {
            ("locations", "list"): self._locations,
            ("locations", "get"): self._locations,
            ("operations", "get"): self._operation,
            ("acceleratorTypes", "list"): self._accelerator_types,
            ("nodes", "list"): self._list,
            ("nodes", "get"): self._get,
            ("nodes", "create"): self._create_node,
            ("nodes", "delete"): self._delete_node,
            ("nodes", "update"): self._update_node,
            ("nodes", "getGuestAttributes"): self._guest_attributes,
            ("queuedResources", "list"): self._list,
            ("queuedResources", "get"): self._get,
            ("queuedResources", "create"): self._create_queued,
            ("queuedResources", "delete"): self._delete_queued,
        }.get((kind, action))
        if method is None:
            raise _no_method(request)
        if key[1] and kind in ("nodes", "queuedResources"):
            with self.lock:
                if key not in self._kind(kind):
                    name = where.partition(":")[0]
                    raise ApiError(404, "NOT_FOUND", f"Resource '{name}' was not found")
        return method(request, kind, key)

    def _kind(self, kind: str) -> dict[Key, Json]:
        return self.nodes if kind == "nodes" else self.queued

    def _other(self, request: Request) -> Json:
        """Answer for Compute Engine, OS Login and the Resource Manager."""
        if (request.method, request.path) == ("GET", f"/compute/v1/projects/{self.project}"):
            keys = [{"key": "ssh-keys", "value": self.project_ssh_keys}]
            metadata = {"items": keys if self.project_ssh_keys else []}
            return {"name": self.project, "id": "1", "commonInstanceMetadata": metadata}
        if re.fullmatch(r"/v1/users/[^/]+(/loginProfile|:importSshPublicKey)", request.path):
            profile = {"name": "1", "posixAccounts": [{"primary": True, "username": "root"}]}
            return profile if request.method == "GET" else {"loginProfile": profile}
        if (request.method, request.path) == ("GET", f"/v1/projects/{self.project}"):
            return {"projectId": self.project, "projectNumber": "1", "lifecycleState": "ACTIVE"}
        raise _no_method(request)

    def _locations(self, request: Request, kind: str, key: Key) -> Json:
        prefix = f"projects/{self.project}/locations"
        zones = sorted(self.zones) if key[0] == "-" else [key[0]]
        found = [{"name": f"{prefix}/{zone}", "locationId": zone} for zone in zones]
        return self._page(request, kind, found) if key[0] == "-" else found[0]

    def _operation(self, request: Request, kind: str, key: Key) -> Json:
        name = f"projects/{self.project}/locations/{key[0]}/operations/{key[1]}"
        with self.lock:
            if name not in self.operations:
                raise ApiError(404, "NOT_FOUND", f"Resource '{name}' was not found")
            return copy.deepcopy(self.operations[name])

    def _accelerator_types(self, request: Request, kind: str, key: Key) -> Json:
        prefix = f"projects/{self.project}/locations/{key[0]}/acceleratorTypes"
        return self._page(
            request, kind, [{"name": f"{prefix}/{name}", "type": name} for name in _TYPES]
        )

    def _list(self, request: Request, kind: str, key: Key) -> Json:
        with self.lock:
            there = copy.deepcopy(self._kind(kind))
        found = [item for (zone, _), item in sorted(there.items()) if key[0] in (zone, "-")]
        return self._page(request, kind, found)

    def _get(self, request: Request, kind: str, key: Key) -> Json:
        with self.lock:
            return copy.deepcopy(self._kind(kind)[key])

    def _create_node(self, request: Request, kind: str, key: Key) -> Json:
        name = request.query.get("nodeId", "")
        return self._reply(self.create_node((key[0], _valid(name)), request.body or {}))

    def _delete_node(self, request: Request, kind: str, key: Key) -> Json:
        return self._reply(self.delete_node(key))

    def _update_node(self, request: Request, kind: str, key: Key) -> Json:
        if request.query.get("updateMask") != "metadata":
            raise ApiError(400, "INVALID_ARGUMENT", "only metadata can be updated here")
        return self._reply(self.patch_metadata(key, (request.body or {}).get("metadata", {})))

    def _guest_attributes(self, request: Request, kind: str, key: Key) -> Json:
        with self.lock:
            addresses = self.addresses_of(key)
        asked = [int(worker) for worker in (request.body or {}).get("workerIds", []) if worker]
        found = []
        for worker in asked or range(len(addresses)):
            words = self.host_keys.get(addresses[worker], "").split()
            item = {"namespace": "hostkeys", "key": "ssh-ed25519", "value": "".join(words[1:2])}
            found.append({"queryPath": "", "queryValue": {"items": [item] if words else []}})
        return {"guestAttributes": found}

    def _create_queued(self, request: Request, kind: str, key: Key) -> Json:
        name = request.query.get("queuedResourceId", "")
        body = request.body or {}
        if not body.get("tpu", {}).get("nodeSpec"):
            raise ApiError(400, "INVALID_ARGUMENT", "tpu.node_spec is missing")
        return self._reply(self.create_queued((key[0], _valid(name)), body))

    def _delete_queued(self, request: Request, kind: str, key: Key) -> Json:
        force = request.query.get("force", "").lower() == "true"
        return self._reply(self.delete_queued(key, force))

    def _reply(self, operation: Json) -> Json:
        with self.lock:
            return copy.deepcopy(operation)

    def _page(self, request: Request, field: str, items: list[Json]) -> Json:
        start = int(request.query.get("pageToken") or 0)
        size = min(int(request.query.get("pageSize") or self.page_size), self.page_size)
        more = {"nextPageToken": str(start + size)} if start + size < len(items) else {}
        return {field: items[start : start + size], **more}


def _action(request: Request, match: re.Match[str]) -> str:
    """What a request does, as permissions call it."""
    single = match["name"] or (match["zone"] and not match["kind"])
    actions = {
        "GET": "get" if single else "list",
        "POST": "create",
        "PATCH": "update",
        "DELETE": "delete",
    }
    return actions.get(request.method, request.method)


def _valid(name: str) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
        raise ApiError(400, "INVALID_ARGUMENT", f"Invalid resource ID {name!r}")
    return name


def _no_method(request: Request) -> ApiError:
    return ApiError(404, "NOT_FOUND", f"no such method: {request.method} {request.path}")
