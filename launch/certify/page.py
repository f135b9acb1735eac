"""The certificate as a page: one file, no script, nothing fetched. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from launch.certify.certificate import headline, topology_line
from launch.certify.judge import FAILED
from launch.times import duration

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 40
_COLORS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1917; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; border-left: .5rem solid #15803d; padding-left: .8rem; }
h1.failed { border-color: #b91c1c; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e7e5e4;
  vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: #b91c1c; font-weight: 600; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
.swatch { display: inline-block; width: 1.4rem; height: .3rem; margin-right: .4rem;
  vertical-align: middle; }
code { background: #f5f5f4; padding: 0 .2rem; overflow-wrap: anywhere; }
svg text { font: 12px system-ui, sans-serif; fill: #57534e; }
"""


def render(record: Mapping[str, Any]) -> str:
    """The page of a certificate."""
    failed = record["verdict"] == FAILED
    title = headline(record)
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1{' class=failed' if failed else ''}>{_text(title[:1].upper() + title[1:])}</h1>",
        f"<p>Verdict <code>{_text(record['verdict'])}</code>, on {_text(record['started_at'][:19])}"
        f" UTC, in {duration(record['seconds'])}: {record['num_processes']} process(es), "
        f"{_text(record['devices'])}, mesh {_text(_mesh(record))}.</p>",
    ]
    if record["first_difference"]:
        lines = record["first_difference"]["told"].splitlines()
        parts.append("<h2>What differs, and what it points to</h2>")
        parts += [f"<p>{_text(line)}</p>" for line in lines]
        parts.append(f"<p>Cause: <code>{_text(record['first_difference']['cause'])}</code></p>")
    parts += ["<h2>Loss</h2>", chart(record["runs"], record["interruptions"]), _legend(record)]
    parts += _interruptions(record) + _topologies(record) + _facts(record)
    parts.append("</body></html>\n")
    return "\n".join(parts)


def chart(runs: Sequence[Mapping[str, Any]], interruptions: Sequence[Mapping[str, Any]]) -> str:
    """The losses of all runs over each other, as an SVG; dashed where a run was interrupted."""
    curves = [
        (run["name"], sorted((int(step), loss) for step, loss in run["losses"].items()))
        for run in runs
    ]
    points = [point for _, curve in curves for point in curve if math.isfinite(point[1])]
    if not points:
        return "<p>No step was recorded.</p>"
    steps = [step for step, _ in points]
    losses = [loss for _, loss in points]
    low, high = min(losses), max(losses)
    if low == high:
        low, high = low - 0.5, high + 0.5
    first = min(steps)
    last = max(first + 1, *steps)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        return _TOP + (high - loss) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='Loss by step' "
        "xmlns='http://www.w3.org/2000/svg' style='width:100%;height:auto'>"
    ]
    for share in range(5):
        loss = low + (high - low) * share / 4
        drawn.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y(loss):.1f}' y2='{y(loss):.1f}' "
            "stroke='#e7e5e4'/>"
            f"<text x='{_LEFT - 8}' y='{y(loss) + 4:.1f}' text-anchor='end'>{loss:.4g}</text>"
        )
    for step in range(first, last + 1, max(1, (last - first) // 12)):
        drawn.append(
            f"<text x='{x(step):.1f}' y='{_HEIGHT - 20}' text-anchor='middle'>{step}</text>"
        )
    drawn.append(f"<text x='{_WIDTH / 2}' y='{_HEIGHT - 4}' text-anchor='middle'>step</text>")
    for hit in interruptions:
        if hit["delivered"] and hit["step"] is not None:
            place = x(min(max(hit["step"], first), last))
            drawn.append(
                f"<line x1='{place:.1f}' x2='{place:.1f}' y1='{_TOP}' y2='{_HEIGHT - _BOTTOM}' "
                "stroke='#a8a29e' stroke-dasharray='3 4'>"
                f"<title>{_text(hit['text'])}</title></line>"
            )
    for number, (name, curve) in enumerate(curves):
        # The reference is broad and pale, so that what lies on it can be seen.
        color, width = ("#d6d3d1", 9) if number == 0 else (_color(number), 2)
        path = " ".join(
            f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve if math.isfinite(loss)
        )
        drawn.append(
            f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='{width}' "
            "stroke-linejoin='round' stroke-linecap='round'>"
            f"<title>{_text(name)}</title></polyline>"
        )
    return "".join([*drawn, "</svg>"])


def _legend(record: Mapping[str, Any]) -> str:
    spans = [
        f"<span><i class='swatch' style='background:{'#d6d3d1' if n == 0 else _color(n)}'></i>"
        f"{_text(run['name'])}: {_text(run['what'])}</span>"
        for n, run in enumerate(record["runs"])
    ]
    return f"<p class='legend'>{' '.join(spans)}</p>"


def _interruptions(record: Mapping[str, Any]) -> list[str]:
    if not record["interruptions"]:
        return []
    rows = [
        "<tr><th>#<th>what<th>step<th>run, attempt<th>where it hit<th>went on from"
        "<th>delivered</tr>"
    ]
    for hit in record["interruptions"]:
        yes = "yes" if hit["delivered"] else "<span class='bad'>no</span>"
        rows.append(
            f"<tr><td>{hit['id']}<td>{_text(hit['text'])}<td class='number'>{_number(hit['step'])}"
            f"<td>{_text(hit['trial'])}, {_number(hit['attempt'])}<td>{_text(hit['where'])}"
            f"<td class='number'>{_number(hit['resumed_at'])}<td>{yes}</tr>"
        )
    found = ["<h2>Interruptions, on the same topology</h2>", f"<table>{''.join(rows)}</table>"]
    if record["not_applicable"]:
        names = ", ".join(record["not_applicable"])
        found.append(f"<p>Not applicable, as this config has no evaluations: {_text(names)}.</p>")
    return found


def _topologies(record: Mapping[str, Any]) -> list[str]:
    if not record["topologies"]:
        return []
    rows = "".join(
        f"<tr><td>{_text(one['name'])}<td{' class=bad' if one['verdict'] == FAILED else ''}>"
        f"{_text(topology_line(one, record))}</tr>"
        for one in record["topologies"]
    )
    most = record["tolerance"]
    return [
        "<h2>Other topologies</h2>",
        f"<table>{rows}</table>",
        "<p>Sums are taken in another order there. Computing in "
        f"{_text(most['dtype'])}, losses may differ by {most['loss']:g} of their size, and the "
        f"params by {most['params']:g} of the way that they went since the checkpoint that both "
        "went on from. Rows, learning rates, counters and random numbers must be the same.</p>",
    ]


def _facts(record: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {text}" for name, text in (record["versions"] or {}).items())
    facts = {
        "Command": " ".join(record["command"]),
        "Steps": f"{record['steps']}, a checkpoint every {record['save_every_steps']}, an "
        + (
            f"evaluation every {record['eval_every_steps']}"
            if record["eval_every_steps"]
            else "evaluation never"
        ),
        "Versions": versions,
        "Config (SHA-256)": record["config_sha256"],
        "Code (SHA-256)": record["code_sha256"],
        "Seed of the interruptions": record["seed"],
    }
    rows = "".join(
        f"<tr><td>{_text(name)}<td><code>{_text(value)}</code></tr>"
        for name, value in facts.items()
    )
    return ["<h2>What was run</h2>", f"<table>{rows}</table>"]


def _mesh(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in (record["mesh"] or {}).items())


def _color(number: int) -> str:
    return _COLORS[(number - 1) % len(_COLORS)]


def _number(value: Any) -> str:
    return "" if value is None else str(value)


def _text(value: Any) -> str:
    return html.escape(str(value))
