"""What processes compare before the first step, and how what differs is told."""

from __future__ import annotations

import sys

import pytest

from trainer import fingerprint
from trainer.fingerprint import differences

LEAD = {"config.seed": "3", "flax": "0.12.8", "the code of trainer.step": "aa"}
CASES = {
    "nothing differs": ([{}, {}, {}], [], ()),
    "one has another config": (
        [{}, {}, {"config.seed": "4"}],
        ["config.seed is 4 on process 2, 3 on the others"],
        (2,),
    ),
    "the lead is the odd one": (
        [{}, {"flax": "0.12.9"}, {"flax": "0.12.9"}],
        ["flax is 0.12.8 on process 0, 0.12.9 on the others"],
        (0,),
    ),
    "of two, the lead is right": (
        [{}, {"flax": "0.12.9"}],
        ["flax is 0.12.9 on process 1, 0.12.8 on the others"],
        (1,),
    ),
    "a stale file on one host": (
        [{}, {"the code of trainer.step": "bb"}, {"the code of trainer.step": "bb"}, {}, {}],
        ["the code of trainer.step differs on processes 1, 2"],
        (1, 2),
    ),
    "three of a kind and two others": (
        [{}, {"config.seed": "4"}, {}, {"config.seed": "5"}, {}],
        ["config.seed is 4 on process 1; config.seed is 5 on process 3, 3 on the others"],
        (1, 3),
    ),
    "one has a module more": (
        [{}, {}, {"the code of mine": "cc"}],
        ["the code of mine differs on process 2"],
        (2,),
    ),
    "two things on two processes": (
        [{}, {"flax": "1"}, {"config.seed": "4"}],
        [
            "config.seed is 4 on process 2, 3 on the others",
            "flax is 1 on process 1, 0.12.8 on the others",
        ],
        (1, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_processes_that_differ_from_most_are_told_with_what_differs(name):
    others, told, odd = CASES[name]
    found = differences(LEAD, others)
    assert [str(difference) for difference in found] == told
    assert {process for difference in found for process in difference.odd} == set(odd)


def test_the_code_that_is_compared_is_what_was_imported_and_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    before = fingerprint.code()
    assert {"the code of mine", "the code of trainer.fingerprint"} <= before.keys()
    assert not any(name.startswith(("the code of jax", "the code of json")) for name in before)
    (tmp_path / "mine.py").write_text("x = 2\n")
    after = fingerprint.code()
    assert [name for name in after if after[name] != before[name]] == ["the code of mine"]
    del sys.modules[mine.__name__]


def test_where_a_process_dumps_its_programs_is_its_own_affair(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x/3 --xla_cpu_enable_fast_math=true")
    assert (
        fingerprint.fingerprint({"a": {"b": 1}})["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true"
    )
    assert fingerprint.fingerprint({"a": {"b": 1}})["config.a.b"] == "1"
