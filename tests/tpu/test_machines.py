"""Getting TPU slices and giving them back, whatever Google Cloud answers: nothing is left."""

import copy
import signal
import threading
import time
from typing import Any

import pytest

from launch import contract
from tests.testing.gangs import wait_until
from tests.testing.tpu_cloud import ZONE, Cloud
from tests.testing.tpu_muster import TpuMuster

OTHER_ZONE = "us-east5-b"
PROGRAM = "print('hello')"


@pytest.fixture
def one_host(cloud: Cloud, storage, tmp_path):
    """Makes a `muster` with one slice of one VM; takes fields of the section `tpu`."""

    def make(**tpu: Any) -> TpuMuster:
        return TpuMuster(tmp_path / "code", cloud, storage, accelerator="v5litepod-4", tpu=tpu)

    return make


def created(muster: TpuMuster) -> list[str]:
    """The zones in which things were asked for with success, in order."""
    asked = [one for one in muster.cloud.api.mutations() if one.method == "POST"]
    return [one.path.split("/")[5] for one in asked if one.status == 200]


def check_done(muster: TpuMuster, done) -> None:
    """The run has completed, and nothing is left of it."""
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert "hello" in done.stdout
    assert (muster.there(), muster.jobs()) == ([], [])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("quota", ("quota:", "Quota limit", "muster gc", "ask for more quota")),
        ("forbidden", ("permission:", "roles/tpu.admin")),
        ("disabled", ("disabled:", "gcloud services enable tpu.googleapis.com")),
        ("zone", ("cluster.tpu.zones='us-nowhere1-a'", "gcloud compute tpus locations list")),
        ("accelerator", ("cluster.accelerator='v5litepod-4'", "accelerator-types list")),
        ("login", ("login:", "gcloud auth login")),
    ],
)
def test_what_waiting_does_not_mend_is_refused_in_one_line(one_host, cloud, what, says):
    muster = one_host(zones=("us-nowhere1-a" if what == "zone" else ZONE,))
    if what == "quota":
        cloud.api.quota = 0
    elif what == "forbidden":
        cloud.api.forbidden = True
    elif what == "disabled":
        cloud.api.disabled = True
    elif what == "accelerator":
        message = 'Accelerator type "v5litepod-4" is not available in zone'
        cloud.api.fault("POST", "/queuedResources$", status=400, message=message)
    elif what == "login":
        message = "Request had invalid authentication credentials."
        cloud.api.fault("POST", "/queuedResources$", status=401, message=message, times=5)
    done = muster.run(program=PROGRAM)
    assert done.returncode == contract.EXIT_CONFIG, done.stderr
    last = done.stderr.splitlines()[-1]
    assert all(word in last for word in says), done.stderr
    assert "Traceback" not in done.stderr
    assert muster.there() == []


def test_a_zone_without_capacity_is_left_for_another_and_strangers_stay(one_host, cloud):
    muster = one_host(way="direct", zones=(ZONE, OTHER_ZONE))
    cloud.api.stockout_zones.add(ZONE)
    # At the end, one deletion goes wrong.
    cloud.api.fault("DELETE", "/nodes/", status=400, code="FAILED_PRECONDITION")
    strangers: list[Any] = []

    def add_strangers(request) -> None:
        name = request.query.get("nodeId", "")
        if name and OTHER_ZONE in request.path and not strangers:
            other, waiting = f"{name}0", "WAITING_FOR_RESOURCES"
            kind = {"acceleratorType": "v5litepod-4", "labels": {"muster-run": "another"}}
            cloud.api.hold = True
            spec = {"tpu": {"nodeSpec": [{"nodeId": other, "node": kind}]}}
            cloud.api.create_queued((OTHER_ZONE, other), spec)
            wait_until(lambda: cloud.queued_state(other, OTHER_ZONE) == waiting, "it to wait")
            cloud.api.set_queued(other, "SUSPENDED")
            cloud.api.add_node(OTHER_ZONE, other, "v5litepod-4")
            strangers.append(copy.deepcopy(cloud.api.queued))
            strangers.append(
                {(OTHER_ZONE, other): copy.deepcopy(cloud.api.nodes[OTHER_ZONE, other])}
            )
            cloud.api.hold = False

    cloud.api.on_request = add_strangers
    done = muster.run(program=PROGRAM)
    assert done.returncode == contract.EXIT_DONE, done.stderr
    assert "hello" in done.stdout
    assert created(muster) == [ZONE, OTHER_ZONE]
    assert f"{ZONE}: stockout" in done.stderr
    assert f"trying {OTHER_ZONE}" in done.stderr
    assert "is not deleted yet: FAILED_PRECONDITION" in done.stderr
    assert [cloud.api.queued, cloud.api.nodes] == strangers


def test_a_queued_resource_that_failed_is_deleted_and_another_zone_tried(one_host, cloud):
    muster = one_host(zones=(ZONE, OTHER_ZONE))

    def fail_its_node(request) -> None:
        if request.method == "POST" and f"{ZONE}/queuedResources" in request.path:
            cloud.api.operation_error("muster", 8, "There is no more capacity in the zone")

    cloud.api.on_request = fail_its_node
    done = muster.run(program=PROGRAM)
    check_done(muster, done)
    assert created(muster) == [ZONE, OTHER_ZONE]
    assert f"in {ZONE} is FAILED: RESOURCE_EXHAUSTED" in done.stderr


def test_creations_that_end_in_errors_are_made_anew(one_host, cloud):
    muster = one_host(way="direct", zones=(ZONE, OTHER_ZONE))
    cloud.api.operation_error("-0$", 13, "an internal error")
    cloud.api.operation_error("-1$", 13, "one that leaves something", half_made=True)
    done = muster.run(program=PROGRAM)
    check_done(muster, done)
    assert created(muster) == [ZONE, OTHER_ZONE, ZONE]
    assert f"{ZONE}: failure: INTERNAL: an internal error; trying {OTHER_ZONE}" in done.stderr
    assert "INTERNAL: one that leaves something; tried again in 5" in done.stderr


def test_an_api_that_gives_no_answer_is_asked_again_and_what_it_made_is_ours(one_host, cloud):
    muster = one_host()
    # gcloud itself asks five times, but only once when it is told to ask less often.
    cloud.api.fault("POST", "/queuedResources$", status=503, times=5)
    message = (
        "Quota exceeded for quota metric 'Write requests' and limit 'Write requests per minute per "
        "user' of service 'tpu.googleapis.com' for consumer 'project_number:1'."
    )
    cloud.api.fault("POST", "/queuedResources$", status=429, message=message)
    # And then there is one, but nobody is told.
    cloud.api.fault("POST", "/queuedResources$", effect=True, drop=True)
    done = muster.run(program=PROGRAM)
    check_done(muster, done)
    asked = [one.status for one in cloud.api.mutations() if one.path.endswith("queuedResources")]
    assert asked == [503] * 5 + [429, 0, 409]
    said = [line for line in done.stderr.splitlines() if "gives no answer" in line]
    assert said == [
        "muster: Google Cloud gives no answer, asked again: UNAVAILABLE: made by the test",
        f"muster: Google Cloud gives no answer, asked again: RESOURCE_EXHAUSTED: {message}",
    ]


def test_a_run_that_is_stopped_while_nodes_are_created_leaves_none(one_host, cloud):
    muster = one_host(way="direct")
    asked = threading.Event()
    cloud.api.fault("POST", "/nodes$", times=2)  # gcloud asks again, whoever has lost interest.
    cloud.api.on_request = lambda request: asked.set() if request.method == "POST" else None
    started = muster.start(program=PROGRAM)
    assert asked.wait(30)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == contract.EXIT_RESUMABLE, err
    time.sleep(4.0)
    assert muster.there() == []
    assert created(muster) == []
