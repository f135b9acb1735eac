"""A plan for people to read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.ledger import human_bytes


def report(record: Mapping[str, Any]) -> str:
    """The report of a plan's record."""
    return "\n".join(
        [
            *_head(record),
            *_memory(record),
            *_buffers(record),
            *_suggestions(record),
            record["ledger_text"],
            *_moves(record),
            *_arithmetic(record),
            *_bound(record),
            *_others(record),
        ]
    )


def _head(record: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"plan for {record['target']['name']}: one step of {record['global_batch_size']} examples, "
        f"compiled in {record['compile_seconds']:.1f} s ({versions})"
    ]
    if record["simulated"]:
        lines.append(
            "simulated: compiled for CPU devices of one process here; the program of a gang, and "
            "of GPUs even more so, has other temporaries and collectives"
        )
    return lines


def _memory(record: Mapping[str, Any]) -> list[str]:
    peak, room = record["peak_bytes"], record["usable_hbm_bytes"] or record["hbm_bytes"]
    if room is None:
        lines = [f"memory: {human_bytes(peak)} per device (how much there is is not known)"]
    else:
        of = f"{human_bytes(peak)} of {human_bytes(room)} per device at the peak"
        lines = [
            f"fits: {of}, {human_bytes(room - peak)} to spare"
            if record["fits"]
            else f"DOES NOT FIT: {of}, {human_bytes(peak - room)} too much"
        ]
    groups = record["ledger"]["groups"]
    inside = ", ".join(
        f"{name} {human_bytes(group['device_bytes'])}" for name, group in groups.items()
    )
    aliased = f"{human_bytes(record['alias_bytes'])} of them in place of arguments"
    rows = [
        ("arguments", record["argument_bytes"], f"{inside}, and the batch"),
        ("outputs", record["output_bytes"], aliased if record["alias_bytes"] else ""),
        ("temporaries", record["temp_bytes"], ""),
        ("program", record["code_bytes"], ""),
    ]
    return lines + [
        f"  {name:<12} {human_bytes(size):>10}  {note}".rstrip() for name, size, note in rows
    ]


def _buffers(record: Mapping[str, Any]) -> list[str]:
    rows = record["largest_buffers"]
    if not rows:
        return []
    most = 8 if record["fits"] else len(rows)
    shown = [
        (human_bytes(row["bytes"]), row["shape"],
         f"{row['name']}, {row['what']}" if row["kind"] == "argument" else row["what"])
        for row in rows[:most]
    ]  # fmt: skip
    return ["largest buffers at the peak:", *_columns(shown, right=(0,))]


def _suggestions(record: Mapping[str, Any]) -> list[str]:
    if record["fits"] is not False:
        return []
    rows = record["suggestions"]
    if not rows:
        return ["nothing near to it is estimated to fit; `muster plan --search` looks further"]
    return [
        "what is estimated to fit (`muster plan --search` looks further, and compiles):",
        *(
            f"  {shlex.join(row['overrides'])}  {human_bytes(row['estimated_bytes'])}"
            for row in rows
        ),
    ]


def _moves(record: Mapping[str, Any]) -> list[str]:
    rows = [
        (row["kind"], ", ".join(row["axes"]), row["link"].upper(), row["dtype"],
         f"{row['count']:.0f} times", human_bytes(row["bytes"]))
        for row in record["collectives"]
    ]  # fmt: skip
    if not rows:
        return ["moves nothing between devices"]
    lines = ["moves, each device in a step:", *_columns(rows, right=(4, 5))]
    least = record["least_bytes"]
    if "all" in least:
        pairs = [("all links", sum(record["link_bytes"].values()), least["all"])]
    else:
        pairs = [(link.upper(), record["link_bytes"].get(link, 0.0), least[link])
                 for link in ("ici", "dcn")]  # fmt: skip
    for name, moved, needed in pairs:
        if moved or needed:
            ratio = f" ({moved / needed:.2f} times)" if needed else ""
            lines.append(
                f"  {name}: {human_bytes(moved)}, and this parallelism needs "
                f"{human_bytes(needed)}{ratio}"
            )
    if record["unknown_loops"]:
        lines.append(f"  {record['unknown_loops']} loop(s) of unknown length are counted once")
    return lines


def _arithmetic(record: Mapping[str, Any]) -> list[str]:
    model, compiled = record["model_flops"], record["compiled_flops"]
    lines = []
    if model:
        formula = record["model_flops_formula"]
        lines.append(f"model FLOPs: {model:.4g} a step" + (f" ({formula})" if formula else ""))
    kernels = record["kernel_flops"]
    said = (
        f", {kernels:.3g} of them in kernels, by their own estimate or by formula"
        if kernels
        else ""
    )
    ratio = f", {compiled / model:.3f} times the model's" if model and compiled else ""
    again = record["remat_flops"]
    ratio += f"; {again / compiled:.1%} compute the forward pass again" if again else ""
    lines.append(f"compiled FLOPs: {compiled:.4g} a step over all devices{ratio}{said}")
    if record["silent_kernels"]:
        lines.append(f"  not counted, since they do not say: {', '.join(record['silent_kernels'])}")
    return lines


def _bound(record: Mapping[str, Any]) -> list[str]:
    bound = record["step_seconds_bound"]
    if bound is None:
        return ["bound on the step's time: none, since what a device can do is not known"]
    parts = ", ".join(
        f"{name.upper() if name in ('ici', 'dcn') else name} {_seconds(seconds)}"
        for name, seconds in record["bounds"].items()
        if seconds is not None
    )
    mfu = record["mfu_bound"]
    best = f"; MFU at most {100 * mfu:.1f}%" if mfu is not None else ""
    tokens = record["tokens_per_step"] / bound
    return [
        f"no step is quicker than {_seconds(bound)} ({record['bound_by']}), {tokens:,.0f} tokens "
        f"per second{best}",
        f"  a bound and no prediction, by {record['peaks']['source']}: {parts}",
    ]


def _others(record: Mapping[str, Any]) -> list[str]:
    return [
        f"checkpoint: {human_bytes(record['checkpoint_bytes'])}, "
        f"{_seconds(record['checkpoint_seconds'])} at "
        f"{human_bytes(record['checkpoint_bytes_per_second'])}/s, 1 GB/s from each host",
        *record["remarks"],
    ]


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def _columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
