"""Silent corruption: what several devices hold a copy of is compared, and who differs is named.

A chip that computes wrong or a memory that forgets changes a copy of a parameter on one device
alone, and no error comes of it: the copies then train apart. Fingerprints of the copies find it.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from trainer import device_digest, leaf_digest
from trainer.agreement import fail_together, say, settle
from trainer.state import Leaves, StateLayout

_SMALL_BYTES = 2**16  # Of a shard: it is fingerprinted on the host, which spares a compilation.
_NAMED = 3  # Leaves that the message names; more are counted.

# Group of devices with the same shards -> what one of them has of each leaf, in order.
Digests = dict[str, list[str]]


class ReplicaError(RuntimeError):
    """Copies of the state that must be equal are not."""


class ReplicaCheck:
    """Compares all copies of the state's shards every so many steps.

    Args:
      layout: of the state.
      every_steps: how often; 0 is never.
    """

    def __init__(self, layout: StateLayout, every_steps: int):
        self._layout = layout
        self._every = every_steps
        self._good: int | None = None  # the newest step whose copies were equal
        self._process_of = {d.id: d.process_index for d in layout.mesh.devices.flat}

    @functools.cached_property
    def _groups(self) -> list[dict[int, str]]:
        """Of each leaf: device -> the group of those that hold its shard, if it is not alone."""
        return [_groups_of(leaf.shape, leaf.sharding) for leaf in self._layout.abstract]

    def due(self, step: int) -> bool:
        """Is this a step to look? There is nothing to look at where nothing has a copy."""
        return self._every > 0 and step % self._every == 0 and any(self._groups)

    def check(self, step: int, leaves: Leaves) -> None:
        """Compare. Collective: every process must call this, with the same step.

        Waits for the devices. A small program for each kind of large leaf, and one exchange over
        the coordination service: a line of a few digests from each device.

        Raises:
          ReplicaError: on all processes, accusing those whose copy differs.
        """
        began = time.perf_counter()
        own = self._digests(leaves)
        short = {d: {g: _together(all_) for g, all_ in found.items()} for d, found in own.items()}
        differing = settle("replicas", short, _differing)
        if differing:
            detail = {d: {g: found[g] for g in differing if g in found} for d, found in own.items()}
            self._fail(step, settle("replicas/leaves", detail, self._tell))
        if self._good is None:
            took = time.perf_counter() - began
            say(f"compared all copies of the state in {took:.3f} s; every {self._every} steps")
        self._good = step

    def _digests(self, leaves: Leaves) -> dict[str, Digests]:
        """Of each of this process's devices, by its id."""
        found: dict[str, Digests] = defaultdict(lambda: defaultdict(list))
        made = [
            self._start(leaf) if groups else None
            for leaf, groups in zip(leaves, self._groups, strict=True)
        ]
        for sums, groups in zip(made, self._groups, strict=True):
            for shard in sums.addressable_shards if sums is not None else ():
                if group := groups.get(shard.device.id):
                    found[str(shard.device.id)][group].append(_text(jax.device_get(shard.data)))
        return {device: dict(of_device) for device, of_device in found.items()}

    @staticmethod
    def _start(leaf: jax.Array) -> Any:
        """What is to be fetched of a leaf: sums that its devices make, or the leaf itself."""
        if leaf.addressable_data(0).nbytes <= _SMALL_BYTES or not device_digest.has_digest(leaf):
            key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.key_data(leaf) if key else leaf
        return device_digest.local_program(leaf.shape, leaf.dtype, leaf.sharding)(leaf)

    def _tell(self, reports: Sequence[Mapping[str, Digests]]) -> dict[str, Any]:
        """The lead: which leaves differ, and where. As JSON."""
        by_device = {device: found for report in reports for device, found in report.items()}
        names: dict[str, set[int]] = {}
        tied = False
        for group in sorted({g for found in by_device.values() for g in found}):
            holders = {
                device: found[group] for device, found in by_device.items() if group in found
            }
            # Leaves of a group, in the order in which every device has listed them.
            of_group = [
                name
                for name, groups in zip(self._layout.names, self._groups, strict=True)
                if group in groups.values()
            ]
            for number, name in enumerate(of_group):
                values: dict[str, list[int]] = defaultdict(list)
                for device, digests in holders.items():
                    values[digests[number]].append(int(device))
                odd, unclear = _odd(values)
                tied |= unclear
                if odd:
                    names.setdefault(name, set()).update(self._process_of[d] for d in odd)
        return {
            "names": list(names),
            "processes": sorted(set().union(*names.values())),
            "tied": tied,
        }

    def _fail(self, step: int, told: Mapping[str, Any]) -> None:
        names, processes = told["names"], told["processes"]
        more = f" and of {len(names) - _NAMED} more leaves" if len(names) > _NAMED else ""
        who = " and ".join(f"process {i}" for i in processes[:4])
        who += f" and {len(processes) - 4} others" if len(processes) > 4 else ""
        what = f"of {', '.join(names[:_NAMED])}{more}"
        since = f"step {self._good}" if self._good is not None else "the start"
        if told["tied"]:
            text = f"the copies {what} on {who} differ, and of two nothing tells which is right"
        else:
            text = f"the copy {what} on {who} is not like the others"
        error = ReplicaError(
            f"at step {step} {text}: a device computes wrong or its memory forgets. They were "
            f"equal at {since}; steps saved after that may hold it "
            "(muster checkpoints RUN delete STEP)"
        )
        fail_together(error, processes)


@functools.lru_cache(maxsize=1024)  # Leaves are of few kinds, and devices may be thousands.
def _groups_of(shape: tuple[int, ...], sharding: NamedSharding) -> dict[int, str]:
    """Device id -> a name of the devices that hold the same shard; those that share with others."""
    holders: dict[tuple, list[int]] = defaultdict(list)
    for device, index in sharding.devices_indices_map(shape).items():
        holders[tuple(part.indices(n) for part, n in zip(index, shape, strict=True))].append(
            device.id
        )
    found = {}
    for devices in holders.values():
        if len(devices) > 1:
            name = hashlib.sha256(repr(sorted(devices)).encode()).hexdigest()[:12]
            found.update(dict.fromkeys(devices, name))
    return found


def _text(data: np.ndarray) -> str:
    if data.dtype == np.uint32 and data.shape == (1, 2):
        return leaf_digest.as_text(int(data[0, 0]), int(data[0, 1]))
    return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()[:16]


def _together(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _differing(reports: Sequence[Mapping[str, Mapping[str, str]]]) -> list[str]:
    """The lead: the groups whose devices do not have the same."""
    found: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        for of_device in report.values():
            for group, digest in of_device.items():
                found[group].add(digest)
    return sorted(group for group, digests in found.items() if len(digests) > 1)


def _odd(values: Mapping[str, list[int]]) -> tuple[list[int], bool]:
    """Devices that do not have what most have, and whether there is no such majority."""
    if len(values) == 1:
        return [], False
    ranked = sorted(values.values(), key=len, reverse=True)
    unclear = len(ranked[0]) == len(ranked[1])
    odd = ranked if unclear else ranked[1:]
    return sorted(device for devices in odd for device in devices), unclear
