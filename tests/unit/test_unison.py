"""Who of a gang differs, in what, and what a process says of itself; gangs that differ are in
tests/multi_process."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from launch.spec import load_config, plain
from tests.testing import tiny
from trainer import agreement, fingerprint, unison
from trainer.fingerprint import THE_CONFIG_FILE

RATE = "config/config.optimizer.adamw.learning_rate"
STEP = "code/trainer/step.py"
PROGRAM = "program/the step's program"
LEAD = {RATE: "0.01", "package/flax": "0.12.2", STEP: "a1", PROGRAM: "b2"}
ADVICE = "; start every process with the same config, packages, environment and code"

# What each process has that the first three entries of a case's list do not say is the lead's.
CASES: dict[str, tuple[list[dict[str, str | None]], list[int], str]] = {
    "nobody": ([{}, {}, {}], [], ""),
    "one of three": (
        [{}, {}, {RATE: "0.001"}],
        [2],
        "config.optimizer.adamw.learning_rate is 0.001 on process 2, 0.01 on the others" + ADVICE,
    ),
    "one of two, whom nobody outvotes": (
        [{}, {RATE: "0.001"}],
        [1],
        "config.optimizer.adamw.learning_rate is 0.001 on process 1, 0.01 on process 0" + ADVICE,
    ),
    "two of four, who are no majority": (
        [{}, {"package/flax": "9"}, {}, {"package/flax": "9"}],
        [1, 3],
        "flax is 9 on processes 1 and 3, 0.12.2 on the others" + ADVICE,
    ),
    "the lead": (
        [{}, {"package/flax": "9"}, {"package/flax": "9"}],
        [0],
        "flax is 0.12.2 on process 0, 9 on the others" + ADVICE,
    ),
    "all, each in its own way": (
        [{}, {"package/flax": "8"}, {"package/flax": "9"}],
        [1, 2],
        "flax is 8 on process 1, 9 on process 2, 0.12.2 on process 0" + ADVICE,
    ),
    "two in different fields": (
        [{}, {STEP: "a2"}, {RATE: "1"}, {}],
        [1, 2],
        "config.optimizer.adamw.learning_rate is 1 on process 2, 0.01 on the others; "
        "trainer/step.py differs on process 1" + ADVICE,
    ),
    "one that lacks a package": (
        [{}, {}, {"package/flax": None}],
        [2],
        "flax is not there on process 2, 0.12.2 on the others" + ADVICE,
    ),
    "one that alone has a package": (
        [{}, {}, {"package/libtpu": "1.0"}],
        [2],
        "libtpu is 1.0 on process 2, not there on the others" + ADVICE,
    ),
    "nobody, when a module is loaded on one process alone": (
        [{}, {STEP: None}, {"code/mine/pictures.py": "c3"}],
        [],
        "",
    ),
    "many of more": (
        [{}, *[{PROGRAM: "b3"}] * 7, *[{}] * 12],
        [1, 2, 3, 4, 5, 6, 7],
        "the step's program differs on processes 1, 2, 3 and 4 others; the task's Python code "
        "depends there on the process (its id, clock, random numbers or files): make it the same "
        "on all",
    ),
}


def changed(fields: dict[str, str | None]) -> fingerprint.Fingerprint:
    """The lead's fingerprint with other fields; None takes one away."""
    merged = {**LEAD, **fields}
    return {field: text for field, text in merged.items() if text is not None}


@pytest.mark.parametrize("name", CASES)
def test_who_differs_is(name):
    processes, differing, text = CASES[name]
    reports = [unison.compare(LEAD, changed(fields)) for fields in processes]
    found = unison.find(LEAD, reports)
    assert (list(found.differing), found.text) == (differing, text) if found else not differing


def test_of_many_differences_few_are_reported_and_fewer_told():
    leads = {f"config/config.x{i:02}": "1" for i in range(30)}
    own = unison.compare(leads, dict.fromkeys(leads, "2"))
    assert (len(own.fields), own.num_more) == (8, 22)
    found = unison.find(leads, [unison.compare(leads, leads)] * 2 + [own])
    assert found is not None
    assert found.text.count("on the others") == 5
    assert "config.x04 is 2 on process 2, 1 on the others; and 25 more; start every" in found.text


def modules(folder: Path, **texts: str) -> dict[str, Any]:
    """Modules whose source files are in a folder, as if they were loaded."""
    made = {}
    for name, text in texts.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        made[name.replace("__", ".")] = types.ModuleType(name)
        made[name.replace("__", ".")].__file__ = str(path)
    return made


def test_the_source_file_that_differs_is_named_wherever_the_checkout_lies(tmp_path):
    here = modules(tmp_path / "a", mine__model="x = 1\n", mine__data="y = 1\n")
    there = modules(tmp_path / "b", mine__model="x = 2\n", mine__data="y = 1\n")
    leads, own = fingerprint.code(here, ()), fingerprint.code(there, ())
    assert leads.keys() == {"mine/model.py", "mine/data.py"}
    assert [path for path in leads if leads[path] != own[path]] == ["mine/model.py"]


def test_installed_packages_and_python_are_told_by_version_unless_they_are_the_tasks(tmp_path):
    installed = modules(tmp_path / "lib" / "site-packages", theirs__task="", other__thing="")
    library = {name: sys.modules[name] for name in ("json", "pytest", "jax")}
    assert fingerprint.code({**installed, **library}, {"theirs"}).keys() == {"theirs/task.py"}


def test_what_is_no_module_or_has_no_file_is_passed_over(tmp_path):
    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for, which may load anything")

    odd = {"none": None, "built_in": sys, "lazy": Lazy("lazy"), "number": 3}
    gone = types.ModuleType("gone")
    gone.__file__ = str(tmp_path / "archive.zip" / "gone.py")
    assert fingerprint.code({**odd, "gone": gone}, ()) == {}


def test_flags_that_say_where_to_write_may_differ():
    env = {
        "XLA_FLAGS": " --xla_a=1  --xla_dump_to=/tmp/3 --xla_b",
        "LIBTPU_INIT_ARGS": "",
        "X": "1",
    }
    assert fingerprint.variables(env) == {"XLA_FLAGS": '"--xla_a=1 --xla_b"'}


def test_a_process_says_its_config_its_packages_jax_options_and_code():
    config = tiny.get_config("witness")
    config.task = "x" * 300
    task = tiny.Witness(config.model, config.data)
    found = fingerprint.of_start(plain(config), task)
    assert found[RATE] == "0.01"
    assert found["package/jax"] == jax.__version__
    assert found["jax option/jax_enable_x64"] == "False"
    assert {
        "code/trainer/task.py",
        "code/trainer/unison.py",
        "code/tests/testing/tiny.py",
    } <= found.keys()
    assert len(found["config/config.task"]) < 150
    config.task = "x" * 299 + "y"
    assert (
        fingerprint.of_start(plain(config), task)["config/config.task"]
        != (found["config/config.task"])
    )


def test_the_config_file_is_hashed_under_one_name(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return {'a': 1}\n")
    load_config("config", [f"--config={path}"])
    first = fingerprint.code(sys.modules, ())[THE_CONFIG_FILE]
    path.write_text("def get_config():\n    return {'a': 1}  # Another.\n")
    assert fingerprint.code(sys.modules, ())[THE_CONFIG_FILE] != first


def test_a_program_is_known_by_what_it_computes_not_by_where_it_is_written():
    def hashed(function: Any) -> str:
        (text,) = fingerprint.of_program(jax.jit(function).lower(jnp.ones(3)), "step").values()
        return text

    def f(x):
        return x * 2

    first = hashed(f)

    def f(x):
        return x * 2

    assert hashed(f) == first

    def f(x):
        return x * 3

    assert hashed(f) != first


def test_alone_there_is_nobody_to_differ_from():
    unison.check_start({}, None)
    unison.check_same("x", dict(LEAD))
    assert agreement.settle("x", (1, 2), lambda values: {"all": values}) == {"all": [[1, 2]]}
