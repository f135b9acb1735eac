"""Queued resources: accepted, waiting, provisioned and deleted."""

from __future__ import annotations

import copy
from collections.abc import Callable

from tests.testing.tpu_api_nodes import TpuNodes
from tests.testing.tpu_api_state import ApiError, Json, Key, accelerator_of, chips_of, now


class TpuQueue(TpuNodes):
    """The service's queued resources, and all the rest of its state."""

    def set_queued(self, name: str, state: str, error: tuple[int, str] | None = None) -> None:
        """Put a queued resource into a state; it then does not go on by itself."""
        with self.lock:
            self._set_state(self.queued[self._key(self.queued, name)], state, error)

    def create_queued(self, key: Key, body: Json) -> Json:
        """Queue a request for nodes; its creation's operation."""
        zone, name = key
        with self.lock:
            self._check_new(self.queued, key, "queuedResources")
            self._check_quota(zone, sum(chips_of(spec, zone) for spec in body["tpu"]["nodeSpec"]))
            queued = {
                **copy.deepcopy(body),
                "name": f"projects/{self.project}/locations/{zone}/queuedResources/{name}",
                "createTime": now(),
                "state": {"state": "CREATING"},
            }
            operation = self.operation(zone, queued["name"], "create")
            error, half_made = self._take_error(name)
            if error is None or half_made:
                self.queued[key] = queued
            if error is not None:
                self._finish(operation, error=error)
                return operation
            self._set_state(queued, "ACCEPTED")
            self._finish(operation, copy.deepcopy(queued))
        self._start(self._work_off, key, queued)
        return operation

    def delete_queued(self, key: Key, force: bool) -> Json:
        """Start to delete a queued resource, by force with its nodes."""
        with self.lock:
            queued = self.queued[key]
            nodes = self.nodes_of(queued)
            if nodes and not force:
                raise ApiError(
                    400,
                    "FAILED_PRECONDITION",
                    f"Queued resource {queued['name']} has nodes; delete these first, or use force",
                )
            self._set_state(queued, "DELETING")
            for node in nodes:
                self.nodes[node]["state"] = "DELETING"
            operation = self.operation(key[0], queued["name"], "delete")

        def done() -> None:
            with self.lock:
                if self.queued.get(key) is queued:
                    del self.queued[key]
                self._finish(operation, {})

        self._start(self._delete_nodes, nodes, done)
        return operation

    def nodes_of(self, queued: Json) -> list[Key]:
        """The nodes that a queued resource has."""
        return [key for key, node in self.nodes.items()
                if node.get("queuedResource") == queued["name"]]  # fmt: skip

    def _work_off(self, key: Key, queued: Json) -> None:
        """Let a queued resource go from ACCEPTED to ACTIVE, unless somebody else changes it."""
        third = self.provision_seconds / 3

        def is_in(state: str) -> Callable[[], bool]:
            return lambda: self.queued.get(key) is queued and queued["state"]["state"] == state

        if not self._pass_time(third, is_in("ACCEPTED")):
            return
        self._set_state(queued, "WAITING_FOR_RESOURCES")
        made: list[tuple[Key, Json]] = []
        while not made:
            if not self._pass_time(third, is_in("WAITING_FOR_RESOURCES")):
                return
            with self.lock:
                if not self.hold and key[0] not in self.stockout_zones:
                    made = self._make_nodes(key, queued)
        threads = [self._start(self._raise, queued, *one) for one in made]
        for thread in threads:
            thread.join()
        with self.lock:
            ready = all(self.nodes.get(key) is node and node["state"] == "READY"
                        for key, node in made)  # fmt: skip
            if is_in("PROVISIONING")() and ready:
                self._set_state(queued, "ACTIVE")

    def _raise(self, queued: Json, key: Key, node: Json) -> None:
        """Bring one of its nodes up; without it, the queued resource has failed."""
        error, stays = self._bring_up(key, node)
        if error and not stays:
            with self.lock:
                self._drop(key, node)
                self._set_state(queued, "FAILED", (error["code"], error["message"]))

    def _make_nodes(self, key: Key, queued: Json) -> list[tuple[Key, Json]]:
        """A queued resource's nodes, all of them or none for want of addresses."""
        if queued["state"]["state"] != "WAITING_FOR_RESOURCES":
            return []
        zone, name = key
        specs = [one for spec in queued["tpu"]["nodeSpec"] for one in _single_specs(name, spec)]
        hosts = sum(accelerator_of(spec["node"], zone).hosts for spec in specs)
        if hosts > len(self._free):
            return []
        taken = [spec["nodeId"] for spec in specs if (zone, spec["nodeId"]) in self.nodes]
        if taken:
            error = f"Resource 'nodes/{taken[0]}' already exists"
            self._set_state(queued, "FAILED", (6, error))
            return []
        scheduling = {"spot": True} if "spot" in queued else {}
        made = []
        for spec in specs:
            one = (zone, spec["nodeId"])
            more = {"queuedResource": queued["name"], "schedulingConfig": scheduling}
            made.append((one, self._new_node(one, spec["node"], **more)))
            self._take_addresses(one)
        queued["tpu"]["nodeSpec"] = specs
        self._set_state(queued, "PROVISIONING")
        return made


def _single_specs(queued_name: str, spec: Json) -> list[Json]:
    """A node spec for each node that a spec stands for."""
    several = spec.get("multisliceParams") or spec.get("multiNodeParams")
    if not several:
        return [spec]
    prefix = several.get("nodeIdPrefix") or queued_name
    return [{**copy.deepcopy(spec), "nodeId": f"{prefix}-{i}"} for i in range(several["nodeCount"])]
