"""Plans that were made: found again as long as nothing changed that they depend on."""

from __future__ import annotations

import importlib.metadata
import os
import stat

import pytest

from launch.plan import cache, code
from launch.spec import cluster_spec, load_config
from tests.testing.plans import record

CONFIG = {
    "task": "mine.task:Mine",
    "num_steps": 3,
    "global_batch_size": 8,
    "optimizer": {"chain": ("sgd",), "sgd": {"learning_rate": 0.1}},
}
CLUSTER = {"backend": "tpu", "accelerator": "v5litepod-16", "tpu": {"zones": ("us-west4-a",)}}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A task of the user's own, in a package, that imports a module of the user's own."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "task.py").write_text("import numpy\nfrom . import net\n")
    (tmp_path / "mine" / "net.py").write_text("import deeper\nWIDTH = 1\n")
    (tmp_path / "deeper.py").touch()
    (tmp_path / "other.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.CACHE_DIR, str(tmp_path / "cache"))
    return tmp_path


def key(config=None, cluster=None, env=None) -> str:
    merged = {**CONFIG, **(config or {})}
    return cache.key(merged, cluster_spec({**CLUSTER, **(cluster or {})}), env or {})


CHANGES = {
    "config": {"config": {"num_microbatches": 2}},
    "optimizer": {"config": {"optimizer": {**CONFIG["optimizer"], "sgd": {"learning_rate": 0.2}}}},
    "task": {"config": {"task": "other:Other"}},
    "accelerator": {"cluster": {"accelerator": "v5litepod-8"}},
    "generation": {"cluster": {"accelerator": "v6e-16"}},
    "slices": {"cluster": {"slices": 2}},
    "cluster's env": {"cluster": {"env": {"LIBTPU_INIT_ARGS": "--xla_x=1"}}},
    "env": {"env": {"XLA_FLAGS": "--xla_x=1"}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_is_not_that_of_another(name):
    assert key(**CHANGES[name]) != key()


SAME = {
    "nothing": {},
    "what is beside the step": {"config": {"log_every_steps": 7, "compilation_cache": ""}},
    "where it is asked for": {"cluster": {"tpu": {"zones": ("us-west4-b",)}}},
    "other env": {"env": {"HOME": "/x"}, "cluster": {"env": {"API_TOKEN": "secret"}}},
    "order": {"config": dict(reversed(CONFIG.items()))},
}


@pytest.mark.parametrize("name", SAME)
def test_a_plan_stays_where_nothing_about_the_step_changes(name):
    assert key(**SAME[name]) == key()


@pytest.mark.parametrize("file", ["mine/task.py", "mine/net.py", "mine/__init__.py", "deeper.py"])
def test_code_of_the_users_own_counts_as_far_as_the_task_reaches_it(file, project):
    before = key()
    (project / "other.py").write_text("x = 1")
    assert key() == before
    (project / file).write_text((project / file).read_text() + "# changed\n")
    assert key() != before


def test_the_code_of_the_trainer_counts(project, monkeypatch):
    monkeypatch.setattr(code, "_ROOT", project)
    (project / "trainer").mkdir()
    (project / "trainer" / "step.py").write_text("a = 1")
    before = key()
    (project / "trainer" / "step.py").write_text("a = 2")
    assert key() != before


@pytest.mark.parametrize("package", cache.PACKAGES)
def test_versions_count(package, monkeypatch):
    before = key()
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0" if name == package else version(name)
    )
    assert key() != before


def test_a_config_that_is_loaded_has_the_key_of_its_values(project):
    (project / "config.py").write_text(f"def get_config():\n    return {CONFIG!r}\n")
    loaded = load_config("config", ["--config=config.py"])
    assert cache.key(loaded.config, cluster_spec(CLUSTER), {}) == key()


def test_a_plan_is_found_again_and_is_its_owners_alone(project):
    assert cache.find("k") is None
    cache.keep("k", record(), "text")
    found = cache.find("k")
    assert found == cache.Plan(record(), "text", cached=True)
    assert found.fits
    [file] = (project / "cache" / "plans").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


BROKEN = {
    "torn": '{"key": "k", "plan": {"fits": tr',
    "empty": "",
    "no object": "[1]",
    "another's": '{"key": "j", "plan": {"fits": true}, "text": ""}',
    "no plan": '{"key": "k", "text": ""}',
    "no verdict": '{"key": "k", "plan": {}, "text": ""}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_is_no_plan_and_is_replaced(name, project):
    cache.keep("k", record(), "text")
    (project / "cache" / "plans" / "k.json").write_text(BROKEN[name])
    assert cache.find("k") is None
    cache.keep("k", record(), "text")
    assert cache.find("k") is not None


def test_what_was_not_used_for_long_is_deleted(project):
    cache.keep("old", record(), "text")
    cache.keep("used", record(), "text")
    for name in ("old", "used"):
        os.utime(project / "cache" / "plans" / f"{name}.json", (0, 0))
    assert cache.find("used") is not None
    cache.keep("new", record(), "text")
    assert [cache.find(name) is None for name in ("old", "used", "new")] == [True, False, False]


def test_a_cache_that_cannot_be_written_stops_nobody(monkeypatch):
    monkeypatch.setenv(cache.CACHE_DIR, "/proc/nowhere")
    cache.keep("k", record(), "text")
    assert cache.find("k") is None
