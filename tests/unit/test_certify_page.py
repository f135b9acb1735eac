"""The certificate as a person reads it: the page and the summary."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from launch.certify import certificate, page


def a_certificate(**changes: Any) -> dict[str, Any]:
    losses = {str(step): 2.0 / step for step in range(1, 13)}
    hit = {
        "id": 1,
        "name": "save:kill",
        "text": "SIGKILL of all processes, in the middle of a save",
        "phase": "save",
        "step": 6,
        "trial": "interrupted",
        "attempt": 0,
        "where": "step 6 was being <written>",
        "resumed_at": 3,
        "delivered": True,
    }
    drift = {"params": 1.2e-6, "loss": 1e-7}
    return {
        "verdict": "bit_exact",
        "first_difference": None,
        "interruptions": [hit, {**hit, "id": 2, "delivered": False, "step": None}],
        "not_applicable": ["eval:kill"],
        "topologies": [
            {"name": "fewer", "topology": "1 process", "verdict": "same_data_bounded_drift",
             "drift": drift, "reason": ""},
            {"name": "more", "topology": "4 processes", "verdict": "not_possible",
             "drift": None, "reason": "global_batch_size"},
        ],
        "tolerance": {"dtype": "float32", "loss": 1e-3, "params": 1e-2},
        "steps": 12,
        "save_every_steps": 3,
        "eval_every_steps": 0,
        "seed": 0,
        "num_processes": 2,
        "devices": "2 cpu",
        "mesh": {"data": 2},
        "versions": {"jax": "0.10.2"},
        "config_sha256": "c",
        "code_sha256": "d",
        "command": ["muster", "certify"],
        "started_at": "2026-11-29T12:00:00.0Z",
        "seconds": 61.0,
        "runs": [
            {"name": "reference", "what": "no interruption", "losses": losses},
            {"name": "interrupted", "what": "1 interruption", "losses": losses},
        ],
        **changes,
    }  # fmt: skip


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_the_verdict_first_and_all_curves_and_fetches_nothing():
    parsed = _Tags()
    text = page.render(a_certificate())
    parsed.feed(text)
    names = [tag for tag, _ in parsed.tags]
    assert names.index("h1") < names.index("svg") < names.index("table")
    curves = [attributes for tag, attributes in parsed.tags if tag == "polyline"]
    assert len(curves) == 2
    assert curves[0]["points"] == curves[1]["points"]  # The same losses lie over each other.
    assert len(str(curves[0]["points"]).split()) == 12
    assert "step 6 was being <written>" in parsed.text  # Escaped, so that it is text.
    assert "1.2e-06" in parsed.text
    fetching = {"script", "img", "link", "iframe"}
    assert not fetching & set(names)
    assert all("src" not in a and "href" not in a for _, a in parsed.tags)
    assert "url(" not in text


def test_a_failed_certificate_says_what_and_why():
    first = {"cause": "rng", "told": "first difference: loss\nthe forward pass"}
    record = a_certificate(verdict="failed", first_difference=first)
    text = page.render(record)
    assert "class=failed" in text
    assert text.index("the forward pass") < text.index("<svg")
    lines = certificate.summary(record)
    assert lines[0] == "not certified: a run that is interrupted is not the same run"
    assert "  the forward pass" in lines
    record["first_difference"]["cause"] = "data_time"
    assert "without any interruption" in certificate.summary(record)[0]


def test_the_summary_counts_what_was_delivered_and_names_what_was_not():
    text = "\n".join(certificate.summary(a_certificate()))
    assert "1 of 2 interruptions delivered" in text
    assert "not delivered: SIGKILL of all processes" in text
    assert "not possible: global_batch_size" in text
    assert "drift by 1.2e-06" in text


def test_losses_that_are_not_finite_leave_a_chart():
    runs = [{"name": "reference", "losses": {"1": float("nan"), "2": 1.0}}]
    assert "<polyline" in page.chart(runs, [])
    assert "No step" in page.chart([{"name": "reference", "losses": {}}], [])
