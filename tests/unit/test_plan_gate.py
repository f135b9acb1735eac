"""`muster run` on TPUs plans first. No step is compiled here: the plans are recorded ones."""

from __future__ import annotations

import importlib.util
import json

import pytest

from launch import contract
from launch.command import Done
from launch.main import main
from launch.plan import cache, planner
from launch.plan.planner import Question
from launch.spec import cluster_spec, load_config
from tests.testing.gangs import ROOT
from tests.testing.plans import Files, record


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Configs and a gcloud for one test, and a cache of its own."""
    files = Files(tmp_path)
    monkeypatch.setenv("PATH", files.path)
    monkeypatch.setenv(cache.CACHE_DIR, str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # libtpu, say
    monkeypatch.setattr(planner.command, "run", _must_not_run)
    return files


def _must_not_run(argv, **_):
    if argv[0] == "gcloud":
        return Done(tuple(argv), 1, "", "ERROR: asked")
    raise AssertionError(f"started {argv}")


def plan_of(files: Files, *more: str) -> str:
    """The key of what `muster run` would plan."""
    cluster = load_config("cluster", [*files.words, *more])
    config = load_config("config", cluster.rest)
    return Question((), config.config, cluster_spec(cluster.config)).key


def test_what_does_not_fit_is_refused_with_the_report_before_anything_is_asked(files, capsys):
    cache.keep(plan_of(files), record(fits=False), "the report\nof two lines")
    assert main(files.run()) == contract.EXIT_CONFIG
    *report, line = capsys.readouterr().err.splitlines()
    assert report == ["the report", "of two lines"]
    assert line.startswith("muster: error: the training step does not fit 1 × v5litepod-4: ")
    assert "20.0 GiB of 15.8 GiB" in line
    assert "--search" in line
    assert "--skip_plan" in line
    assert files.asked() == ""
    assert not files.workdir.exists()


def test_what_fits_is_told_in_a_line_and_goes_on(files, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        planner.command, "run", lambda argv, **_: asked.append(argv) or Done(argv, 1, "", "no")
    )
    cache.keep(plan_of(files), record(), "the report")
    assert main(files.run()) == contract.EXIT_CONFIG  # gcloud's answer is of no use.
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == (
        "muster: the training step fits: 8.0 GiB of 15.8 GiB per device, 250 ms a step at the "
        "least (MFU 50% at the most) (planned before)"
    )
    assert asked
    assert all(argv[0] == "gcloud" for argv in asked)


def test_an_override_asks_for_another_plan(files, capsys, monkeypatch):
    cache.keep(plan_of(files, "--config.global_batch_size=16"), record(fits=False), "report")
    refused = Done((), 2, "", "warning\nerror: config.task: no such module\n")
    monkeypatch.setattr(planner, "ask", lambda *_: refused)
    assert main(files.run("--config.global_batch_size=16")) == contract.EXIT_CONFIG
    assert "does not fit" in capsys.readouterr().err
    assert main(files.run()) == contract.EXIT_CONFIG
    told, line = capsys.readouterr().err.splitlines()
    assert "compiling the training step for 1 × v5litepod-4" in told
    assert "muster: error: config.task: no such module (found while planning" in line
    assert files.asked() == ""


@pytest.mark.parametrize("why", ["no libtpu", "planner fails", "no data", "told to skip"])
def test_without_a_plan_the_run_goes_on_and_says_why(why, files, capsys, monkeypatch):
    cache.keep(plan_of(files), record(fits=False), "the report")
    words = files.run()
    if why == "no libtpu":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif why != "told to skip":
        (cache.folder() / f"{plan_of(files)}.json").unlink()
        done = Done((), -9, "", "one\nthe last line\n")
        if why == "no data":
            done = Done((), 2, "", "error: config.data.path='x': is not there\n")
        monkeypatch.setattr(planner, "ask", lambda *_: done)
    else:
        words.append("--skip_plan")
    assert main(words) == contract.EXIT_CONFIG
    err = capsys.readouterr().err
    assert "does not fit" not in err
    assert err.splitlines()[-1].startswith("muster: error: ")  # Of gcloud, which was asked.
    assert "gcloud" in err
    told = {
        "no libtpu": "warning: not planned: libtpu, which compiles for TPUs on a machine without",
        "planner fails": "warning: not planned: the planner was killed: the last line",
        "no data": "warning: not planned: config.data.path='x': is not there",
    }
    assert told.get(why, "") in err
    assert ("jax[tpu]" in err) == (why == "no libtpu")


def test_a_dry_run_says_what_the_gate_would_do_and_does_not_plan(files, capsys):
    def told() -> str:
        assert main(files.run("--dry_run")) == contract.EXIT_DONE
        return capsys.readouterr().out.splitlines()[0]

    assert told() == (
        "# plan: no plan yet: `muster run` compiles the step first, and refuses what does not fit"
    )
    cache.keep(plan_of(files), record(), "")
    assert told().startswith("# plan: the training step fits: 8.0 GiB of 15.8 GiB")
    cache.keep(plan_of(files), record(fits=False), "")
    assert told() == "# plan: `muster run` refuses it: it takes 20.0 GiB of 15.8 GiB per device"


def test_programs_and_clusters_without_tpus_have_no_gate(files, capsys):
    assert main([*files.run("--dry_run"), "--cluster.env.JAX_PLATFORMS=cpu"]) == 0
    assert "# plan" not in capsys.readouterr().out
    words = ["run", f"--cluster={files.cluster}", f"--workdir={files.workdir}", "--dry_run"]
    assert main([*words, "--", "true"]) == 0
    assert "# plan" not in capsys.readouterr().out


def test_a_plan_is_printed_from_the_cache(files, capsys):
    cache.keep(plan_of(files), record(), "the report")
    assert main(["plan", *files.words]) == contract.EXIT_DONE
    assert capsys.readouterr() == ("the report\n", "")
    assert main(["plan", *files.words, "--json"]) == contract.EXIT_DONE
    assert json.loads(capsys.readouterr().out) == record()
    cache.keep(plan_of(files), record(fits=False), "the report")
    assert main(["plan", *files.words]) == contract.EXIT_CONFIG


def test_what_muster_run_would_refuse_is_refused_by_plan_with_the_same_line(files, capsys):
    words = [*files.words, "--config.mesh.fsdp=3"]
    assert main(["plan", *words]) == contract.EXIT_CONFIG
    line = capsys.readouterr().err
    assert main(["run", *words, f"--workdir={files.workdir}"]) == contract.EXIT_CONFIG
    assert capsys.readouterr().err == line
    assert "config.mesh.data=-1: nothing fits" in line


def test_a_secret_of_the_cluster_is_not_on_the_planners_command_line(files, monkeypatch):
    asked = []
    monkeypatch.setattr(planner.command, "run", lambda argv, **_: asked.append(argv) or Done(
        argv, 1, "", ""))  # fmt: skip
    main(["plan", *files.words, "--cluster.env.API_TOKEN=s3cret", "--cluster.env.LEVEL=high"])
    [argv] = asked
    assert "s3cret" not in repr(argv)
    assert "--cluster.env.LEVEL=high" in argv


def test_a_plan_is_kept_with_its_run(tmp_path):
    planner.save(cache.Plan(record(), "the report", cached=True), tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == record()
    assert (tmp_path / "plan.txt").read_text() == "the report\n"


MISTAKES = {
    "no libtpu": ([], "pip install 'jax[tpu]'"),
    "search": (["--compile=3"], "--compile: is for a search; give --search as well"),
    "number": (["--search", "--compile=x"], "--compile='x': must be a number from 0"),
    "parallel": (["--search", "--parallel=0"], "--parallel='0': must be a number from 1"),
    "batches": (["--search", "--device_batches=0"], "--device_batches='0': must be numbers"),
    "flag": (["--serach"], "muster plan has no flag '--serach'; did you mean 'search'?"),
    "stray": (["x"], "muster plan takes no argument; got ['x']"),
    "topology": (["--cluster.accelerator=v5litepod-17"], "use v5litepod-16 or v5litepod-32"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_plan_is_one_line(name, files, capsys, monkeypatch):
    more, message = MISTAKES[name]
    if name == "no libtpu":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", *files.words, *more]) == contract.EXIT_CONFIG
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_the_help_names_the_flags_of_a_plan(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("muster plan", "--search", "--skip_plan", "--accelerators"))
    assert (ROOT / "docs" / "plan.md").exists()
