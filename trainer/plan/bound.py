"""A lower bound of the time of a step: no machine of these figures can be quicker.

The products at the peak FLOP/s; the state read once and written once at the memory's bandwidth;
what each link has to carry, at all links' bandwidth together in one direction. The largest of them
is the bound, as if all the rest were hidden behind it. It is not a prediction.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from launch.topology import Chip


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What a device can do at most. None where it is not known.

    Attributes:
      flops: FLOP/s of matmuls.
      memory: bytes per second, read and written together.
      links: bytes per second that a device can send, by link.
      source: where the figures are from.
    """

    flops: float | None
    memory: float | None
    links: Mapping[str, float]
    source: str


def peaks_of(chip: Chip) -> Peaks:
    """The figures of a chip that the vendor states."""
    links = {"ici": chip.ici_bytes_per_second / 2, "host": chip.ici_bytes_per_second / 2}
    if chip.dcn_bytes_per_second is not None:
        links["dcn"] = chip.dcn_bytes_per_second
    name = f"{chip.name}'s data sheet"
    return Peaks(chip.peak_flops, chip.hbm_bytes_per_second, links, name)


def measured_peaks(num_devices: int, state_bytes: float) -> Peaks:
    """What this machine's cores do, shared by `num_devices` CPU devices.

    Args:
      num_devices: devices that run at the same time on this machine.
      state_bytes: of a device; memory is measured on as much, since caches are quicker.
    """
    flops = max(_matmul_flops(size) for size in (512, 1024, 2048))
    count = max(1024, min(int(state_bytes) // 4, 1 << 26))
    x = jnp.ones((count,), jnp.float32)
    seconds = _best(jax.jit(lambda x: x + 1.0), x)
    bandwidth = 2 * 4 * count / seconds
    return Peaks(flops / num_devices, bandwidth, {}, "measured on this machine")


def _matmul_flops(size: int) -> float:
    x = jnp.ones((size, size), jnp.float32)
    return 2 * size**3 / _best(jax.jit(lambda x: x @ x), x)


def _best(function: Any, x: jax.Array) -> float:
    """The shortest of several runs, in seconds."""
    run = function.lower(x).compile()
    times = []
    for _ in range(7):
        began = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - began)
    return min(times)


def bounds(
    peaks: Peaks | None, flops: float, state_bytes: float, link_bytes: Mapping[str, float]
) -> dict[str, float | None]:
    """Seconds that each part of a step takes at the least; None where a peak is not known.

    Args:
      peaks: of a device.
      flops: products of a device in a step.
      state_bytes: arguments and outputs of a device.
      link_bytes: what a device sends, by link.
    """
    if peaks is None:
        return {"compute": None, "memory": None, **dict.fromkeys(link_bytes)}
    found: dict[str, float | None] = {
        "compute": flops / peaks.flops if peaks.flops else None,
        "memory": state_bytes / peaks.memory if peaks.memory else None,
    }
    for link, sent in link_bytes.items():
        speed = peaks.links.get(link)
        found[link] = sent / speed if speed else None
    return found


def largest(parts: Mapping[str, float | None]) -> tuple[float | None, str]:
    """The bound, and which part it comes from."""
    known = {name: seconds for name, seconds in parts.items() if seconds is not None}
    if not known:
        return None, ""
    name = max(known, key=lambda name: known[name])
    return known[name], name
