"""A run directory on Google Cloud Storage: real Orbax, gcsfs and tensorstore, a fake of GCS."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from launch.spec import CheckpointSpec, ConfigError
from tests.testing.gcs import FakeGcs, shared
from tests.testing.packages import required_package
from tests.unit.test_checkpoint import abstract, assert_same, check_until_raised, make_state
from trainer import checkpoint_gcs, storage
from trainer.checkpoint import Checkpointer, CheckpointError
from trainer.checkpoints import __main__ as at_rest
from trainer.metrics import MetricWriter
from trainer.mirror import Mirror

# Not imported yet: that must not happen before the fixture has set the environment.
if importlib.util.find_spec("gcsfs") is None:
    required_package("gcsfs")

BUCKET = "bucket-1"
RUN = f"gs://{BUCKET}/runs/a"
CHECKPOINTS = f"{RUN}/checkpoints"
BELOW = "runs/a/checkpoints/"


@pytest.fixture
def gcs(monkeypatch) -> Iterator[FakeGcs]:
    """The storage, with one empty bucket."""
    server = shared()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    server.bucket(BUCKET)
    server.requests.clear()
    yield server
    server.forgive()


def checkpointer(**spec: Any) -> Checkpointer:
    return Checkpointer(CHECKPOINTS, CheckpointSpec(**spec), config={"seed": 3})


def restore(state: dict[str, jax.Array] | None = None) -> Any:
    return checkpointer().restore(abstract(make_state() if state is None else state))


def top(gcs: FakeGcs) -> list[str]:
    """What lies right below the checkpoint directory, but for the note of what was verified."""
    found = {name.partition("/")[0] for name in gcs.names(BUCKET, BELOW)}
    return sorted(found - {"verified.json"})


_SAVED: dict[str, Any] = {}


@pytest.fixture
def two_steps(gcs) -> FakeGcs:
    """The storage with steps 10 and 20 of `make_state`."""
    if not _SAVED:
        saver = checkpointer()
        for step in (10, 20):
            saver.save(step, make_state(step), {"next": step})
        saver.close()
        _SAVED.update(gcs.buckets[BUCKET])
    gcs.buckets[BUCKET] = copy.deepcopy(_SAVED)
    return gcs


def test_what_is_restored_is_what_was_saved(two_steps):
    restored = restore()
    assert restored.step == 20
    assert restored.data_position == {"next": 20}
    assert restored.config == {"seed": 3}
    assert_same(restored.state, make_state(20))
    assert top(two_steps) == ["10", "20"], "a probe was left behind"


def test_a_run_without_checkpoints_starts_fresh(gcs):
    assert restore() is None


def test_a_step_without_its_commit_file_does_not_count_and_is_deleted(two_steps, caplog):
    del two_steps.buckets[BUCKET][f"{BELOW}20/commit_success.txt"]
    assert restore().step == 10
    assert top(two_steps) == ["10"]
    assert f"{CHECKPOINTS}/20 was never finished" in caplog.text


def test_an_unfinished_step_that_cannot_be_deleted_is_still_no_step(two_steps, caplog):
    del two_steps.buckets[BUCKET][f"{BELOW}20/commit_success.txt"]
    two_steps.fail(400, 1000, "DELETE .*/20/")
    assert restore().step == 10
    assert f"cannot delete {CHECKPOINTS}/20: injected" in caplog.text
    assert top(two_steps) == ["10", "20"]


def test_an_unfinished_step_can_be_saved_again(gcs):
    saver = checkpointer()
    with gcs.hold(f"POST .*name={BELOW}7/commit_success"):
        saver.save(7, make_state(1), None)
        gcs.wait_for(f"POST .*name={BELOW}7/commit_success")
        left = copy.deepcopy(gcs.buckets[BUCKET])
    saver.close()
    gcs.buckets[BUCKET] = left  # As after a kill just before the commit.
    assert f"{BELOW}7/checksums.json" in left
    again = checkpointer()
    assert again.restore(abstract(make_state())) is None
    again.save(7, make_state(2), None, final=True)
    assert_same(restore().state, make_state(2))


def test_an_outage_is_not_taken_for_an_unfinished_or_damaged_step(two_steps):
    before = two_steps.names(BUCKET)
    for pattern in ("GET .*/20/commit_success", "GET .*checksums.json", "GET .*/20/state/.*media"):
        two_steps.fail(400, 1000, pattern)
        with pytest.raises(Exception, match="injected"):
            restore()
        assert two_steps.failures_left() < 1000, pattern
        two_steps.forgive()
        assert two_steps.names(BUCKET) == before
    assert restore().step == 20


def test_the_last_and_every_nth_are_kept(gcs):
    saver = checkpointer(keep_last=2, keep_every_steps=4)
    for step in range(1, 7):
        saver.save(step, {"a": jnp.ones(3)}, None)
    saver.close()
    assert top(gcs) == ["4", "5", "6"]
    deleted = [name for name in gcs.requests if name.startswith("DELETE") and f"{BELOW}1/" in name]
    last_commit = max(i for i, name in enumerate(deleted) if "1/commit_success.txt" in name)
    assert last_commit < min(i for i, name in enumerate(deleted) if "/state/d/" in name), (
        "half deleted it would pass for a step"
    )


def test_a_flipped_bit_is_noticed_in_whatever_object(two_steps, caplog):
    rng = random.Random(0)
    names = [name for name in two_steps.names(BUCKET, f"{BELOW}20/") if name.count("/")]
    assert len(names) > 8
    for name in [*names, "checksums.json"]:
        two_steps.buckets[BUCKET] = copy.deepcopy(_SAVED)
        size = len(two_steps.buckets[BUCKET][f"{BELOW}20/{name}"].data)
        two_steps.flip(BUCKET, f"{BELOW}20/{name}", rng.randrange(size))
        restored = restore()
        assert restored.step == 10, f"a flipped bit in {name} passed unseen"
        assert name in caplog.text
        caplog.clear()
        assert set(two_steps.names(BUCKET, f"{BELOW}damaged/20-0/")) > set(names)
        assert not two_steps.names(BUCKET, f"{BELOW}20/")


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_shorter_or_missing_object_is_noticed(two_steps, harm):
    objects = two_steps.buckets[BUCKET]
    victim = next(name for name in objects if name.startswith(f"{BELOW}20/state/d/"))
    if harm == "remove":
        del objects[victim]
    else:
        objects[victim].data = objects[victim].data[:-1]
    assert restore().step == 10


def test_a_step_whose_setting_aside_was_cut_off_is_set_aside_by_the_next_start(two_steps):
    del two_steps.buckets[BUCKET][f"{BELOW}20/checksums.json"]
    names = set(two_steps.names(BUCKET, f"{BELOW}20/"))
    two_steps.fail(400, 1000, "POST .*(moveTo|rewriteTo).*_METADATA")
    with pytest.raises(Exception, match="injected"):
        restore()
    two_steps.forgive()
    assert f"{BELOW}20/commit_success.txt" in two_steps.buckets[BUCKET]
    assert restore().step == 10
    kept = two_steps.names(BUCKET, f"{BELOW}damaged/")
    assert {name.partition("/")[2] for name in kept} == names


def test_no_usable_step_is_an_error_and_stays_one(two_steps):
    for step in (10, 20):
        del two_steps.buckets[BUCKET][f"{BELOW}{step}/checksums.json"]
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of the checkpoints"):
            restore()


# Orbax closes an event loop over a write that has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_asking_after_a_save_costs_no_request_and_raises_what_went_wrong(gcs):
    saver = checkpointer()
    with gcs.hold(f"POST .*name={BELOW}1/commit_success"):
        saver.save(1, make_state(), None)
        gcs.wait_for(f"POST .*name={BELOW}1/commit_success")
        before = len(gcs.requests)
        assert not any(saver.check() for _ in range(1000))
        assert len(gcs.requests) == before
    saver.wait()
    gcs.fail(400, 1000, f"POST .*name={BELOW}2/state/")
    saver.save(2, make_state(), None)
    with pytest.raises(CheckpointError, match=r"saving step 2 .*; step 1 is untouched"):
        check_until_raised(saver)
    gcs.forgive()
    assert restore().step == 1


def test_metrics_are_there_before_the_commit_of_their_step(gcs):
    with MetricWriter(RUN) as writer:
        saver = checkpointer()
        saver.before_commit = writer.flush
        writer.write(3, {"loss": 1.0})
        saver.save(3, make_state(), None, final=True)
        data = gcs.buckets[BUCKET]["runs/a/metrics.jsonl"].data
        generation = gcs.buckets[BUCKET]["runs/a/metrics.jsonl"].generation
        assert b'"step": 3' in data
        assert generation < gcs.buckets[BUCKET][f"{BELOW}3/commit_success.txt"].generation
        saver.close()


def test_a_checkpoint_can_be_copied_to_a_disk_and_back(two_steps, tmp_path):
    for name in two_steps.names(BUCKET, BELOW):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(two_steps.buckets[BUCKET][BELOW + name].data)
    local = Checkpointer(tmp_path, CheckpointSpec(keep_last=3), config={})
    restored = local.restore(abstract(make_state()))
    assert restored is not None
    assert_same(restored.state, make_state(20))
    local.save(30, make_state(30), None, final=True)
    victim = max((tmp_path / "20" / "state" / "d").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    for path in (tmp_path / "30").rglob("*"):
        if path.is_file():
            where = f"{BELOW}{path.relative_to(tmp_path)}"
            two_steps.put(BUCKET, where, path.read_bytes(), {})
    assert_same(restore().state, make_state(30))
    part = next(n for n in two_steps.names(BUCKET) if f"{BELOW}30/state/d/" in n)
    two_steps.flip(BUCKET, part, 0)
    assert restore().step == 20
    (tmp_path / "30" / "checksums.json").unlink()
    again = Checkpointer(tmp_path, CheckpointSpec(), config={}).restore(abstract(make_state()))
    assert again is not None
    assert again.step == 10, "a CRC32C is verified on a disk as well"


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        (f"gs://{BUCKET}-ro/x", "cannot be written: access is denied (caller does not have"),
        ("gs://nobody/x", "cannot be written: there is no such bucket"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_one_clear_line(gcs, workdir, words):
    gcs.bucket(f"{BUCKET}-ro")
    gcs.forbid_writes(f"{BUCKET}-ro")
    with pytest.raises(ConfigError) as caught:
        Checkpointer(f"{workdir}/checkpoints", CheckpointSpec(), config={})
    text = str(caught.value)
    assert text.startswith(f"--workdir='{workdir}': {words}"), text
    assert "choose another --workdir" in text
    assert "\n" not in text


def test_missing_credentials_are_told_with_what_gives_some(gcs):
    gcs.fail(401, 1, "upload")
    with pytest.raises(ConfigError, match=r"no valid credentials \(injected.*gcloud auth app"):
        checkpointer()


def test_an_outage_at_the_start_is_no_mistake_of_the_users(gcs):
    gcs.fail(418, 1, "upload")
    with pytest.raises(Exception, match="injected") as caught:
        checkpointer()
    assert not isinstance(caught.value, ConfigError), "it must be tried again"


def test_a_process_that_sees_another_bucket_says_so(gcs):
    directory = storage.path(CHECKPOINTS)
    checkpoint_gcs.write_probe(directory, "here")
    assert checkpoint_gcs.read_probe(directory, "here", 1) is None
    assert "not the same on the lead" in (checkpoint_gcs.read_probe(directory, "there", 1) or "")
    checkpoint_gcs.remove_probe(directory)
    assert "not the same on the lead" in (checkpoint_gcs.read_probe(directory, "here", 1) or "")
    assert not gcs.names(BUCKET)


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        ("gs://bucket", "must be gs://BUCKET/PATH"),
        ("gs:///path", "must be gs://BUCKET/PATH"),
        ("gs://Bucket/path", "must be gs://BUCKET/PATH"),
        ("gs://bucket/a/../b", "must be gs://BUCKET/PATH"),
        ("gs://bucket/a*", r"must not hold any of \*"),
        ("s3://bucket/path", "must be a directory or gs://"),
    ],
)
def test_what_cannot_be_a_run_directory_is_refused(workdir, words):
    with pytest.raises(ConfigError, match=f"^--workdir='{re.escape(workdir)}': .*{words}"):
        storage.run_directory(workdir)


def test_a_run_directory_is_made_whole(tmp_path, monkeypatch):
    assert storage.run_directory("gs://bucket//a/b/") == "gs://bucket/a/b"
    monkeypatch.chdir(tmp_path)
    assert storage.run_directory("a/../b") == str(tmp_path / "b")
    assert isinstance(storage.path("b"), Path)


def test_without_gcsfs_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    storage.filesystem.cache_clear()
    with pytest.raises(ConfigError, match=r"the package gcsfs.*pip install 'muster\[tpu\]'"):
        storage.run_directory(RUN)


def metrics(gcs: FakeGcs) -> list[int]:
    text = gcs.buckets[BUCKET]["runs/a/metrics.jsonl"].data.decode()
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_metrics_go_on_from_what_is_there(gcs):
    with MetricWriter(RUN) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    whole = gcs.buckets[BUCKET]["runs/a/metrics.jsonl"]
    whole.data += b'{"schema": 1, "step": 4, "lo'  # Killed in the middle of a line.
    with MetricWriter(RUN, start_step=2) as writer:
        writer.write(3, {"loss": 2.0})
        writer.flush()
        assert metrics(gcs) == [1, 2, 3]
    assert len([name for name in gcs.names(BUCKET) if "/events." in name]) == 2


def test_the_temporary_directory_goes_when_all_is_uploaded(gcs):
    mirror = Mirror(RUN, ())
    (mirror.local / "a").write_text("x")
    mirror.close()
    assert gcs.buckets[BUCKET]["runs/a/a"].data == b"x"
    assert not mirror.local.exists()


def test_an_upload_that_fails_is_said_once_and_tried_again(gcs, caplog):
    mirror = Mirror(RUN, (), every_seconds=0.02)
    gcs.fail(400, 1000, "upload")
    (mirror.local / "a").write_text("x")
    while gcs.failures_left() > 990:
        time.sleep(0.01)
    assert not mirror.flush()
    gcs.forgive()
    assert mirror.flush()
    assert caplog.text.count("metrics cannot be uploaded") == 1
    mirror.close()
    assert gcs.buckets[BUCKET]["runs/a/a"].data == b"x"


def test_a_storage_that_hangs_holds_up_nobody(gcs, caplog):
    caplog.set_level(logging.WARNING)
    mirror = Mirror(RUN, (), every_seconds=0.02)
    with gcs.hold("upload"):
        (mirror.local / "a").write_text("x")
        began = time.monotonic()
        assert not mirror.flush(0.2)
        mirror.close(0.2)
        assert time.monotonic() - began < 2
    assert f"not all metrics are in {RUN}; they are in {mirror.local}" in caplog.text
    assert (mirror.local / "a").read_text() == "x"


def test_a_listing_is_whole_over_all_its_pages(gcs):
    for number in range(25):
        gcs.put(BUCKET, f"{BELOW}{number}/commit_success.txt", b"", {})
    directory = storage.path(CHECKPOINTS)
    assert checkpoint_gcs.steps_in(directory) == list(range(24, -1, -1))
    assert len(storage.objects_below(directory)) == 25
    gcs.put(BUCKET, f"{BELOW}25/commit_success.txt", b"", {})  # By another process.
    assert checkpoint_gcs.steps_in(directory)[0] == 25
    assert directory / "25" in list(directory.iterdir()), "epath's own listings are cached"


def test_checkpoints_at_rest_are_listed_verified_copied_and_deleted_there_too(
    two_steps, tmp_path, capsys
):
    def run(*words: str, expect: int = 0) -> dict[str, Any]:
        assert at_rest.main(list(words)) == expect
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    steps = run("list", CHECKPOINTS)["steps"]
    assert [(step["step"], step["state"], step["resume"]) for step in steps] == [
        (20, "complete", True),
        (10, "complete", False),
    ]
    assert all(step["bytes"] > 1000 and step["saved_at"] > "2020" for step in steps)
    # From there to here, and from here to there.
    run("copy", CHECKPOINTS, "20", str(tmp_path / "here"))
    run("copy", str(tmp_path / "here" / "checkpoints"), "20", f"gs://{BUCKET}/runs/b")
    for place in (tmp_path / "here", f"gs://{BUCKET}/runs/b"):
        restored = Checkpointer(f"{place}/checkpoints", CheckpointSpec(), config={}).restore(
            abstract(make_state())
        )
        assert restored is not None
        assert_same(restored.state, make_state(20))
    objects = two_steps.buckets[BUCKET]
    name = max(two_steps.names(BUCKET, f"{BELOW}20/state/"), key=len)
    name = name if name in objects else f"{BELOW}20/state/{name}"
    two_steps.flip(BUCKET, name, 0)
    (report,) = run("verify", CHECKPOINTS, "20", expect=1)["verified"]
    assert name.rpartition("/")[2] in report["problem"]
    assert report["leaves"] is not None
    assert run("list", CHECKPOINTS)["steps"][0]["state"] == "damaged"
    with pytest.raises(ConfigError, match="step 10 is the only good one"):
        at_rest.main(["delete", CHECKPOINTS, "10"])
    run("delete", CHECKPOINTS, "20")
    assert top(two_steps) == ["10"]
