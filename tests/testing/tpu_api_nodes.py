"""Nodes: created, booted, preempted and deleted."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable
from typing import Any

from tests.testing.tpu_api_state import Json, Key, TpuState, accelerator_of, now

_NO_CAPACITY = (
    'There is no more capacity in the zone "{zone}"; you can try in another zone where Cloud TPU '
    "Nodes are offered (see https://cloud.google.com/tpu/docs/regions)"
)
_DELETED = {"code": 10, "message": "The node was deleted while it was created"}
_DELETE_SECONDS = 0.2
_OFF = ("PREEMPTED", "TERMINATED", "STOPPED")


class TpuNodes(TpuState):
    """The service's nodes. Those that have VMs hold addresses."""

    def preempt(self, name: str) -> None:
        """Take a node's VMs away; its queued resource is SUSPENDED."""
        self.set_node(name, state="PREEMPTED")
        with self.lock:
            self._suspend_owner(self.nodes[self._key(self.nodes, name)])

    def set_node(self, name: str, state: str | None = None, health: str | None = None) -> None:
        """Say this of a node from now on; a node that is off has no VMs any more."""
        with self.lock:
            key = self._key(self.nodes, name)
            given = {"state": state, "health": health}
            self.nodes[key].update({field: value for field, value in given.items() if value})
        if state in _OFF:
            self._power_off(key)

    def add_node(
        self, zone: str, name: str, accelerator_type: str, labels: Json | None = None
    ) -> None:
        """Somebody else's node, READY at once; it has VMs if there are addresses left."""
        with self.lock:
            body = {"acceleratorType": accelerator_type, "labels": dict(labels or {})}
            node = self._new_node((zone, name), body)
            there = self._take_addresses((zone, name))
        if not there or not self._power_on((zone, name), node):
            node["state"] = "READY"

    def end(self) -> None:
        """No thread changes anything any more, and no VM is left."""
        self._ended.set()
        for key in list(self._held):
            self._power_off(key)

    def addresses_of(self, key: Key) -> list[str]:
        """The addresses of a node's VMs, in the order of its workers."""
        return list(self._held.get(key, []))

    def create_node(self, key: Key, body: Json) -> Json:
        """Start a node; its creation's operation."""
        with self.lock:
            self._check_new(self.nodes, key, "nodes")
            self._check_quota(key[0], accelerator_of(body, key[0]).chips)
            node = self._new_node(key, body)
            operation = self.operation(key[0], node["name"], "create")
        self._start(self._create, key, node, operation)
        return operation

    def delete_node(self, key: Key) -> Json:
        """Start to delete a node."""
        with self.lock:
            node = self.nodes[key]
            node["state"] = "DELETING"
            operation = self.operation(key[0], node["name"], "delete")
        self._start(self._delete_nodes, [key], lambda: self._finish(operation, {}))
        return operation

    def patch_metadata(self, key: Key, metadata: Json) -> Json:
        """Replace a node's metadata."""
        with self.lock:
            node = self.nodes[key]
            node["metadata"] = metadata
            operation = self.operation(key[0], node["name"], "update")
            self._finish(operation, copy.deepcopy(node))
        with self._power:
            self._tell_keys(key, node)
        return operation

    def _new_node(self, key: Key, body: Json, **more: Any) -> Json:
        zone, name = key
        node = {
            **copy.deepcopy(body),
            "name": f"projects/{self.project}/locations/{zone}/nodes/{name}",
            "id": str(secrets.randbits(60)),
            "apiVersion": "V2",
            "createTime": now(),
            "state": "CREATING",
            **more,
        }
        node.setdefault("metadata", {})
        node.setdefault("labels", {})
        self.nodes[key] = node
        return node

    def _create(self, key: Key, node: Json, operation: Json) -> None:
        """A node's way to READY, and its creation's operation's to its end."""
        error, stays = self._bring_up(key, node)
        with self.lock:
            if error and not stays:
                self._drop(key, node)
            self._finish(operation, None if error else copy.deepcopy(node), error)

    def _bring_up(self, key: Key, node: Json) -> tuple[Json | None, bool]:
        """Let a node go from CREATING to READY.

        Returns:
          Why it did not get there, and whether it stays nevertheless.
        """
        zone, name = key

        def creating() -> bool:
            return self.nodes.get(key) is node and node["state"] == "CREATING"

        if not self._pass_time(self.provision_seconds, creating):
            return _DELETED, True
        error, half_made = self._take_error(name)
        if error:
            return error, half_made
        while self.hold:
            if not self._pass_time(0, creating):
                return _DELETED, True
        with self.lock:
            # Those of a queued resource have been given theirs before.
            full = zone in self.stockout_zones or not self._take_addresses(key)
            if key not in self._held and full:
                return {"code": 8, "message": _NO_CAPACITY.format(zone=zone)}, False
        return (None, False) if self._power_on(key, node) else (_DELETED, True)

    def _drop(self, key: Key, node: Json) -> None:
        """Forget a node that has never been on."""
        if self.nodes.get(key) is node:
            del self.nodes[key]
            self._free += self._held.pop(key, [])

    def _delete_nodes(self, keys: list[Key], done: Callable[[], None]) -> None:
        self._ended.wait(_DELETE_SECONDS)
        for key in keys:
            self._power_off(key)
            with self.lock:
                node = self.nodes.pop(key, None)
                if node:
                    self._suspend_owner(node)
        done()

    def _power_on(self, key: Key, node: Json) -> bool:
        """Boot a node's VMs and call it READY, unless somebody has deleted it."""
        with self._power:
            with self.lock:
                addresses = self._held.get(key, [])
                wanted = self.nodes.get(key) is node and node["state"] == "CREATING"
                if not wanted or self._ended.is_set():
                    return False
            if self.on_boot and addresses:
                self.on_boot(key[1], addresses)
            self._tell_keys(key, node)
            with self.lock:
                if node["state"] == "CREATING":
                    endpoints = [
                        {"ipAddress": ip, "port": 8470, "accessConfig": {"externalIp": ip}}
                        for ip in addresses
                    ]
                    node.update(state="READY", health="HEALTHY", networkEndpoints=endpoints)
            return node["state"] == "READY"

    def _power_off(self, key: Key) -> None:
        with self._power:
            addresses = self._held.get(key, [])
            if addresses and self.on_down:
                self.on_down(key[1], addresses)
            with self.lock:
                self._free += self._held.pop(key, [])

    def _tell_keys(self, key: Key, node: Json) -> None:
        addresses = self._held.get(key, [])
        if addresses and self.on_keys:
            keys = f"{self.project_ssh_keys}\n{node['metadata'].get('ssh-keys', '')}"
            self.on_keys(key[1], addresses, keys)

    def _take_addresses(self, key: Key) -> bool:
        hosts = accelerator_of(self.nodes[key], key[0]).hosts
        if key in self._held or hosts > len(self._free):
            return key in self._held
        self._held[key], self._free = self._free[:hosts], self._free[hosts:]
        return True

    def _suspend_owner(self, node: Json) -> None:
        """A queued resource that has lost a node is not queued again."""
        for queued in self.queued.values():
            living = queued["state"]["state"] in ("PROVISIONING", "ACTIVE")
            if living and queued["name"] == node.get("queuedResource"):
                self._set_state(queued, "SUSPENDED")

    def _set_state(self, queued: Json, state: str, error: tuple[int, str] | None = None) -> None:
        with self.lock:
            queued["state"] = {"state": state, "stateInitiator": "SERVICE"}
            if error:
                code, message = error
                queued["state"]["failedData"] = {"error": {"code": code, "message": message}}
