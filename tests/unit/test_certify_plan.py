"""Where `muster certify` puts faults, and which other topologies it tries."""

from __future__ import annotations

import random

import pytest

from launch.certify import interruptions, topologies
from launch.certify.interruptions import ALL, KINDS, PHASES, Pace, pace, schedule
from launch.spec import ConfigError


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
