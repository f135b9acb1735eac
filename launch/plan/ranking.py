"""What a search has found, as a table for people and as a record for programs. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from launch import contract
from launch.plan.choice import Correction, Way, ranked
from launch.plan.text import short_seconds, size
from launch.table import table

_MOST_ROWS = 12
_HEADS = ("", "way", "fits", "step", "tokens/s", "bound by", "peak", "left", "ICI", "DCN")
_LEGEND = (
    "compiled: as XLA has it; estimated: nothing was compiled, see docs/plan.md. Step: the least",
    "time it can take, and tokens/s the most; ICI and DCN: bytes that a device sends in a step.",
)


def as_text(ways: Sequence[Way], left_out: Sequence[Mapping[str, Any]]) -> str:
    """The table, and the overrides of every row of it."""
    order = ranked(ways)
    correction = Correction.of(ways)
    shown = _worth_showing(order)
    apart = not_alike(ways)
    rows = [
        _HEADS,
        *(_row(number, way, correction, apart) for number, way in enumerate(shown, 1)),
    ]
    lines = table(rows, None, right=(0, 3, 4, 6, 7, 8, 9))
    lines += ["", *_LEGEND]
    if correction.temp_by_remat:
        times = f"{correction.temp:.2f}"
        if len(correction.temp_by_remat) > 1:
            seen = correction.temp_by_remat.items()
            named = ", ".join(f"{_SHORT.get(name, name)} {value:.2f}" for name, value in seen)
            times = f"{times} (remat {named})"
        lines.append(f"estimated temporaries were multiplied by what the compiled show: {times}")
    if len(order) > len(shown):
        rest = len(order) - len(shown)
        lines.append(f"{rest} more ways are slower, do not fit, or are like one of these (--json)")
    lines += [_left_out_line(entry) for entry in left_out]
    lines += [f"could not be compiled: {way.error}" for way in ways if way.error]
    lines += ["", "what gives each row, besides what you have given:"]
    width = len(str(len(shown)))
    for number, way in enumerate(shown, 1):
        words = shlex.join(way.overrides) or "(nothing)"
        lines.append(f"  {number:>{width}}  {words}")
    return "\n".join(lines)


def _left_out_line(entry: Mapping[str, Any]) -> str:
    count = len(entry["meshes"])
    return f"left out: {count} mesh{'es' * (count > 1)}: {entry['reason']}"


def _worth_showing(order: Sequence[Way]) -> list[Way]:
    """What was compiled, and the best of each family up to a number of rows."""
    compiled = {way.family for way in order if way.record is not None}
    shown: list[Way] = []
    seen: set[Any] = set(compiled)
    for way in order:
        if way.record is not None:
            shown.append(way)
        elif way.family not in seen and len(shown) < _MOST_ROWS:
            shown.append(way)
            seen.add(way.family)
    return shown


def not_alike(ways: Sequence[Way]) -> frozenset[str]:
    """Which of `accelerator` and `batch` tell these ways apart."""
    apart = set()
    if len({way.accelerator for way in ways}) > 1:
        apart.add("accelerator")
    if len({way.fields["global_batch_size"] for way in ways}) > 1:
        apart.add("batch")
    return frozenset(apart)


def _row(number: int, way: Way, correction: Correction, apart: frozenset[str]) -> tuple[str, ...]:
    figures = way.figures
    compiled = way.record is not None
    seconds, usable = figures["step_seconds_bound"], way.usable_bytes
    peak = correction.peak_bytes(way)
    links = figures["link_bytes"]
    across = links.get("dcn", 0.0)
    fits = {True: "yes", False: "no"}[correction.fits(way)]
    known = usable is not None
    return (
        str(number),
        describe(way, apart) + (" (compiled)" if compiled else " (estimated)"),
        (fits if compiled else f"{fits}?") if known else "?",
        short_seconds(seconds),
        "?" if not seconds else f"{way.tokens / seconds:,.0f}",
        str(figures.get("bound_by") or ""),
        size(peak),
        "?" if usable is None else size(usable - peak),
        size(sum(links.values()) - across),
        size(across) if across else "",
    )


def describe(way: Way, apart: frozenset[str]) -> str:
    """A way in few words; `apart` as `not_alike` has it."""
    fields = way.fields
    sizes = [
        f"{name}={fields[f'mesh.{name}']}"
        for name in ("data", "fsdp", "tensor", "dcn_data", "dcn_fsdp")
        if fields[f"mesh.{name}"] > 1
    ]
    parts = [" ".join(sizes) or "one device"]
    if "accelerator" in apart:
        parts.insert(0, str(way.accelerator))
    if "model.remat" in fields:
        parts.append(f"remat {_SHORT.get(fields['model.remat'], fields['model.remat'])}")
    if fields["num_microbatches"] > 1:
        parts.append(f"{fields['num_microbatches']} microbatches")
    if fields["sharding.optimizer_axes"]:
        parts.append(f"optimizer over {'+'.join(fields['sharding.optimizer_axes'])}")
    if "batch" in apart:
        parts.append(f"batch {fields['global_batch_size']}")
    return ", ".join(parts)


_SHORT = {"dots_with_no_batch_dims_saveable": "dots"}


def as_record(
    ways: Sequence[Way], left_out: Sequence[Mapping[str, Any]], interrupted: bool
) -> dict[str, Any]:
    """All ways, ranked."""
    correction = Correction.of(ways)
    return {
        "schema": contract.SCHEMA,
        "interrupted": interrupted,
        "temp_correction": correction.temp,
        "temp_correction_by_remat": {str(k): v for k, v in correction.temp_by_remat.items()},
        "rows": [_record(way, correction) for way in ranked(ways)],
        "left_out": list(left_out),
    }


def _record(way: Way, correction: Correction) -> dict[str, Any]:
    figures, usable = way.figures, way.usable_bytes
    peak = correction.peak_bytes(way)
    seconds = figures["step_seconds_bound"]
    return {
        "compiled": way.record is not None,
        "fits": correction.fits(way),
        "overrides": list(way.overrides),
        "accelerator": way.accelerator,
        "devices": way.devices,
        "fields": dict(way.fields),
        "step_seconds_bound": seconds,
        "bound_by": figures.get("bound_by"),
        "seconds_per_token_bound": way.seconds_per_token,
        "tokens_per_step": way.tokens,
        "peak_bytes": int(peak),
        "headroom_bytes": None if usable is None else int(usable - peak),
        "link_bytes": dict(figures["link_bytes"]),
        "estimate": dict(way.estimate),
        "error": way.error,
    }
