"""What `muster certify` decides: where faults are put, what differs first, what that points to."""

from __future__ import annotations

import dataclasses
import random
from html.parser import HTMLParser
from typing import Any

import pytest

from launch.certify import certificate, compare, diagnose, interruptions, judge, page, topologies
from launch.certify.compare import first_difference
from launch.certify.interruptions import ALL, KINDS, PHASES, Pace, pace, schedule
from launch.certify.records import AFTER, INITIAL, RESTORED, Execution, Records, Step
from launch.certify.records import read as read_records
from launch.spec import ConfigError

LEAVES = {
    "model.rngs.count": "rng",
    "model.norm.mean": "batch_statistics",
    "model.w": "params",
    "optimizer.mu.w": "optimizer",
}


# ------------------------------------------------------------------ runs, made up


def step_of(number: int, **changes: Any) -> Step:
    """A step of two processes with four rows."""
    step = Step(
        rows={row: {f"row {4 * number + row}"} for row in range(4)},
        metrics={"loss": {0: 1.0 / number, 1: 1.0 / number}, "grad_norm": {0: 0.5, 1: 0.5}},
        learning_rate={0: 0.1 * number, 1: 0.1 * number},
        position={0: number, 1: number},
    )
    return dataclasses.replace(step, **changes)


def state_of(number: int, **changes: str) -> dict[str, dict[tuple[int, str], str]]:
    """Digests of the leaves after a step."""
    digests = {name: f"{name} {number}" for name in LEAVES} | {
        name.replace("__", "."): value for name, value in changes.items()
    }
    return {name: {(p, "0:4"): value for p in range(2)} for name, value in digests.items()}


def execution(start: int, last: int, number: int = 0) -> Execution:
    """An attempt that did the steps behind `start` up to `last`."""
    states = {(start, RESTORED if start else INITIAL): state_of(start)}
    states |= {(n, AFTER): state_of(n) for n in range(start + 1, last + 1)}
    steps = {n: step_of(n) for n in range(start + 1, last + 1)}
    return Execution(number, start, steps, states, {"kinds": LEAVES} if start == 0 else {})


def reference() -> Records:
    return Records([execution(0, 8)])


def resumed() -> Records:
    """Killed after step 5, gone on from step 4."""
    return Records([execution(0, 5), execution(4, 8, number=1)])


def test_a_resumed_run_that_did_the_same_differs_nowhere():
    assert first_difference(reference(), resumed(), steps=8) is None


def change(where: str) -> Records:
    """The resumed run with one thing changed in its second attempt."""
    run = resumed()
    second = run.attempts[1]
    if where == "restored moments":
        second.states[4, RESTORED] = state_of(4, optimizer__mu__w="zeros")
    elif where == "restored rng":
        second.states[4, RESTORED] = state_of(4, model__rngs__count="other", model__w="other")
    elif where == "rows of the beginning":
        second.steps[5] = step_of(5, rows=step_of(1).rows)
    elif where == "rows of nowhere":
        second.steps[5] = step_of(5, rows={row: {f"new {row}"} for row in range(4)})
    elif where == "rows in another order":
        rows = {row: {f"row {4 * 5 + 3 - row}"} for row in range(4)}
        second.steps[5] = step_of(5, rows=rows)
    elif where == "loss":
        second.steps[5] = step_of(5, metrics={"loss": {0: 0.3}, "grad_norm": {0: 0.4}})
    elif where == "gradient":
        second.steps[5] = step_of(5, metrics={"loss": {0: 0.2}, "grad_norm": {0: 0.4}})
    elif where == "learning rate":
        second.steps[5] = step_of(5, learning_rate={0: 0.7})
    elif where == "params":
        second.states[5, AFTER] = state_of(5, model__w="other")
    elif where == "statistics":
        second.states[5, AFTER] = state_of(5, model__norm__mean="other", model__w="other")
    elif where == "one process":
        second.states[7, AFTER] = state_of(7)
        second.states[7, AFTER]["model.w"][1, "0:4"] = "other"
    elif where == "one row, redone":
        run.attempts[1].steps[5].rows[2] = {"other"}
    return run


@pytest.mark.parametrize(
    ("where", "what", "step", "name", "cause"),
    [
        ("restored moments", RESTORED, 4, "optimizer.mu.w", "optimizer"),
        ("restored rng", RESTORED, 4, "model.rngs.count", "rng"),
        ("rows of the beginning", "rows", 5, "0", "data_position"),
        ("rows in another order", "rows", 5, "0", "data_position"),
        ("rows of nowhere", "rows", 5, "0", "data_random"),
        ("loss", "metric", 5, "loss", "rng"),
        ("gradient", "metric", 5, "grad_norm", "hidden_state"),
        ("learning rate", "learning_rate", 5, "learning_rate", "schedule"),
        ("params", "state", 5, "model.w", "optimizer"),
        ("statistics", "state", 5, "model.norm.mean", "batch_statistics"),
        ("one process", "state", 7, "model.w", "optimizer"),
        ("one row, redone", "rows", 5, "2", "data_random"),
    ],
)
def test_the_first_difference_is_found_and_named(where, what, step, name, cause):
    run = change(where)
    found = first_difference(reference(), run, steps=8)
    assert found is not None
    assert (found.what, found.step, found.name) == (what, step, name)
    diagnosis = diagnose.after_interruption(found, reference(), run)
    assert diagnosis.cause == cause
    assert name in judge.told(found)
    if where == "restored moments":
        assert "moments were reset" in diagnosis.text
    if where == "rows of the beginning":
        assert "rows of step 1" in diagnosis.text
    if where == "one process":
        assert "3 steps after the resume" in diagnosis.text


def test_a_run_that_lacks_a_step_or_a_row_or_its_end_is_not_the_same():
    run = resumed()
    del run.attempts[1].steps[7]
    found = first_difference(reference(), run, steps=8)
    assert found is not None
    assert (found.what, found.step) == ("missing", 7)
    run = resumed()
    del run.attempts[1].steps[8].rows[3]
    assert first_difference(reference(), run, steps=8).name == "row 3"
    run = resumed()
    del run.attempts[1].states[8, AFTER]
    assert first_difference(reference(), run, steps=8).name == "the state"


def test_a_loss_may_drift_within_the_tolerance_and_rows_never():
    loose = compare.Tolerance(metric=1e-3, states=False)
    run = resumed()
    run.attempts[1].states[6, AFTER] = state_of(6, model__w="other")
    run.attempts[1].steps[6] = step_of(6, metrics={"loss": {0: (1 + 5e-4) / 6}})
    assert first_difference(reference(), run, loose, 8) is None
    assert compare.largest_loss_drift(reference(), run) == pytest.approx(5e-4, rel=1e-2)
    run.attempts[1].steps[6] = step_of(6, metrics={"loss": {0: (1 + 5e-3) / 6}})
    assert first_difference(reference(), run, loose, 8).name == "loss"
    rows = change("rows in another order")
    assert first_difference(reference(), rows, loose, 8).what == "rows"


def test_what_is_restored_on_another_topology_is_what_was_saved_where_the_parts_are_the_same():
    loose = compare.Tolerance(metric=1e-3, states=False)
    run = Records([execution(4, 8)])
    restored = state_of(4)
    # One process has all of the first leaf, which two had, and two halves of another.
    restored["model.w"] = {(0, "0:4"): "model.w 4"}
    restored["optimizer.mu.w"] = {(0, "0:2"): "a half", (0, "2:4"): "another"}
    run.attempts[0].states[4, RESTORED] = restored
    assert first_difference(reference(), run, loose, 8) is None
    restored["model.w"] = {(0, "0:4"): "zeros"}
    found = first_difference(reference(), run, loose, 8)
    assert (found.what, found.name, found.found) == (RESTORED, "model.w", "zeros")


def uninterrupted(where: str) -> Records:
    run = reference()
    if where == "order":
        run.attempts[0].steps[1] = step_of(1, rows=step_of(2).rows)
    elif where == "contents":
        for number, step in run.attempts[0].steps.items():
            step.rows = {row: {f"new {number} {row}"} for row in range(4)}
    elif where == "loss":
        run.attempts[0].steps[3] = step_of(3, metrics={"loss": {0: 0.1}})
    elif where == "beginning":
        run.attempts[0].states[0, INITIAL] = state_of(0, model__w="other")
    return run


@pytest.mark.parametrize(
    ("where", "by_hash", "cause", "words"),
    [
        ("order", True, "data_order", "a `set`"),
        ("order", False, "data_time", "same examples in another order"),
        ("contents", False, "data_time", "also with PYTHONHASHSEED fixed"),
        ("contents", None, "data_time", "other contents"),
        ("loss", None, "nondeterministic_op", "at step 3, in loss"),
        ("beginning", None, "initialization", "model.w"),
    ],
)
def test_what_differs_without_any_interruption_is_named_so(where, by_hash, cause, words):
    repeat = uninterrupted(where)
    found = first_difference(reference(), repeat)
    assert found is not None
    diagnosis = diagnose.without_interruption(found, reference(), repeat, by_hash)
    assert diagnosis.cause == cause
    assert words in diagnosis.text


class _Run:
    """A trial that has ended."""

    def __init__(self, name: str, records: Records):
        self.name, self._records = name, records

    def records(self) -> Records:
        return self._records


@pytest.mark.parametrize(
    ("run", "repeat", "asked", "cause"),
    [
        (change("loss"), reference(), ["repeat"], "rng"),
        (change("loss"), uninterrupted("loss"), ["repeat"], "nondeterministic_op"),
        (change("rows of the beginning"), None, [], "data_position"),  # Certain without.
        (change("restored moments"), None, [], "optimizer"),
        (uninterrupted("order"), None, ["hash"], "data_order"),  # Attempt 0 is itself a repeat.
        (change("rows of nowhere"), reference(), ["repeat"], "data_random"),
    ],
)
def test_further_runs_are_made_only_where_they_decide(run, repeat, asked, cause):
    made: list[str] = []

    def runs(which: str) -> list[Any]:
        made.append(which)
        if which == "hash":
            return [_Run("hash-1", reference()), _Run("hash-2", reference())]
        return [_Run("repeat", repeat)]

    found = first_difference(reference(), run)
    assert judge.explain(found, _Run("one", run), reference(), runs).diagnosis.cause == cause
    assert made == asked


# ------------------------------------------------------------------ records


def test_records_are_read_without_the_line_that_a_kill_cut_off(tmp_path):
    folder = tmp_path / "attempt-002"
    folder.mkdir()
    step = '{"event": "step", "step": %d, "rows": [[0, "a"]], "metrics": {"loss": 1.5}, '
    step += '"learning_rate": 0.1, "position": {"next_index": 1}}\n'
    (folder / "process-00001.jsonl").write_text(
        '{"event": "start", "step": 4, "kinds": {"w": "params"}}\n'
        '{"event": "state", "when": "restored", "step": 4, "leaves": {"w": {"0:1": "d"}}}\n'
        + step % 5
        + (step % 6)[:40]
    )
    (attempt,) = read_records(tmp_path).attempts
    assert (attempt.number, attempt.start, list(attempt.steps)) == (2, 4, [5])
    assert attempt.states[4, RESTORED] == {"w": {(1, "0:1"): "d"}}
    assert attempt.steps[5].loss == 1.5


# ------------------------------------------------------------------ where faults are put


def play(planned: list[interruptions.Interruption], pace: Pace) -> list[int]:
    """The interruptions that hit when they are played to a run as the trainer would."""
    saved, hit = 0, []
    for one in planned:
        at = one.step or 0
        if one.phase == "restore":
            if saved == 0:
                continue
        elif one.phase == "save":
            at = max(-(-max(at, saved + 1) // pace.save_every), 1) * pace.save_every
            if at > pace.steps:
                continue
            saved = max(saved, at - pace.save_every)
        elif one.phase == "eval":
            places = [*range(pace.eval_every, pace.steps, pace.eval_every), pace.steps]
            at = next((p for p in places if p >= max(at, saved + 1)), 0)
            if at == 0:
                continue
            saved = at if at == pace.steps else max(saved, at // pace.save_every * pace.save_every)
        elif one.phase == "step":
            at = max(at, saved + 1)
            if at > pace.steps:
                continue
            saved = max(saved, (at - 1) // pace.save_every * pace.save_every)
        if one.kind == "sigterm":
            saved = min(max(saved, at) + 2, pace.steps)
        hit.append(one.id)
    return hit


@pytest.mark.parametrize("steps", range(12, 30))
def test_every_interruption_of_the_default_list_finds_its_place(steps):
    for seed in range(20):
        planned = schedule(ALL, pace(steps, True), 2, seed)
        assert play(planned, pace(steps, True)) == [one.id for one in planned], planned
        assert len(planned) == len(ALL) + 1  # `twice` is two.


def test_most_interruptions_of_any_list_find_their_place_and_the_first_is_no_restore():
    chance = random.Random(1)
    names = [f"{phase}:{kind}" for phase in PHASES for kind in KINDS if kind != "sigterm"]
    for seed in range(200):
        chosen = chance.sample(names, chance.randrange(1, 6))
        planned = schedule(chosen, pace(12, True), 3, seed)
        assert planned[0].phase not in ("restore", "compile")
        hit = play(planned, pace(12, True))
        assert len(hit) >= len(planned) - 1, (chosen, planned)
        assert {one.name for one in planned} >= set(chosen)


def test_whom_it_befalls_is_drawn_by_the_seed_and_the_same_again():
    one, other = (schedule(["step:kill_one"] * 20, pace(12, False), 4, seed=7) for _ in range(2))
    assert one == other
    assert {interruption.process for interruption in one} == {0, 1, 2, 3}
    assert schedule(["step:kill"], pace(12, False), 4, seed=7)[0].process is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step:kil", "did you mean 'step:kill'?"),
        ("nonsense", "there is no 'nonsense'; known: "),
        (",", "names none"),
    ],
)
def test_an_unknown_interruption_is_refused_with_the_closest(text, message):
    with pytest.raises(ConfigError, match="--interruptions") as error:
        interruptions.parse(text)
    assert message in str(error.value)


def test_too_few_steps_are_refused_with_the_number():
    with pytest.raises(ConfigError, match="--steps=7: must be at least 8"):
        pace(7, False, 1)
    with pytest.raises(ConfigError, match="--steps=8: must be at least 12, for saves and 11 "):
        pace(8, False, 11)


def test_without_evaluations_there_is_no_middle_of_one():
    able, unable = interruptions.applicable(ALL, pace(12, False))
    assert unable == ["eval:kill_one", "eval:kill"]
    assert len(able) == len(ALL) - 2


# ------------------------------------------------------------------ other topologies


@pytest.mark.parametrize(
    ("fields", "config", "words"),
    [
        (
            {"processes_per_host": 2, "devices_per_process": 4},
            {},
            [
                ("--cluster.processes_per_host=1",),
                ("--cluster.processes_per_host=4",),
                ("--config.mesh.data=1", "--config.mesh.fsdp=8"),
            ],
        ),
        (
            {"processes_per_host": 1, "hosts": 2},
            {"mesh": {"data": 1, "fsdp": 2}},
            # A mesh that names all sizes leaves no room for other numbers of devices.
            [
                ("--cluster.hosts=1", "--cluster.devices_per_process=2"),
                "fsdp=2 = 2 devices, but the cluster has 4",
                ("--config.mesh.data=2", "--config.mesh.fsdp=1"),
            ],
        ),
        ({}, {}, ["it has one process", ("--cluster.processes_per_host=2",), "are both 1"]),
        (
            {"processes_per_host": 2, "devices_per_process": 4},
            {"global_batch_size": 8},
            # 16 devices cannot share 8 rows; 4 processes of half the devices can.
            [
                ("--cluster.processes_per_host=1",),
                ("--cluster.processes_per_host=4", "--cluster.devices_per_process=2"),
                ("--config.mesh.data=1", "--config.mesh.fsdp=8"),
            ],
        ),
    ],
)
def test_other_topologies_are_derived_or_the_reason_told(fields, config, words, tmp_path):
    from launch.spec import cluster_spec, load_config

    cluster = {"backend": "local", **fields}
    config = {"task": "a:B", "num_steps": 100, "global_batch_size": 16, **config}
    (tmp_path / "cluster.py").write_text(f"def get_config():\n    return {cluster!r}\n")
    (tmp_path / "config.py").write_text(f"def get_config():\n    return {config!r}\n")
    given = (f"--config={tmp_path}/config.py", f"--cluster={tmp_path}/cluster.py")
    loaded = load_config("cluster", given)
    found = topologies.others(
        list(topologies.NAMES),
        given,
        load_config("config", loaded.rest).config,
        cluster_spec(loaded.config),
    )
    for topology, wanted in zip(found, words, strict=True):
        if isinstance(wanted, str):
            assert topology.impossible
            assert wanted in topology.impossible
        else:
            assert (topology.words, topology.impossible) == (wanted, "")


# ------------------------------------------------------------------ the page


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
