"""What can be said of set-up without a gang; the rest is in tests/multi_process."""

from __future__ import annotations

import socket
import threading

import pytest

from launch import contract
from launch.spec import ConfigError
from trainer import distributed, rollcall


def member(local_process_id: int, devices: int | None) -> contract.Membership:
    return contract.Membership("127.0.0.1:1", 8, local_process_id, local_process_id, devices)


@pytest.mark.parametrize(
    ("place", "env", "expected"),
    [
        (member(0, 4), {}, (0, 1, 2, 3)),
        (member(1, 2), {}, (2, 3)),
        (member(1, 2), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        (member(1, 2), {"CUDA_VISIBLE_DEVICES": "2,3"}, (0, 1)),
        (member(1, None), {}, None),
        (member(1, 2), {"JAX_LOCAL_DEVICE_IDS": "0"}, None),
    ],
)
def test_processes_of_one_host_share_its_accelerators(place, env, expected):
    assert distributed.local_device_ids(place, env) == expected


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2"),
        ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "1"}, "SLURM_STEP_NUM_TASKS=3"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"MUSTER_ATTEMPT": "0"}, "MUSTER_ATTEMPT=0"),
    ],
)
def test_an_environment_of_many_is_recognized(env, expected):
    assert distributed.gang_hint(env) == expected


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"process_id": 0}, "--coordinator_address"),
        ({"coordinator_address": "a:1", "num_processes": 2}, "--process_id"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "--process_id"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 1}, "--coordinator_addr"),
    ],
)
def test_half_a_place_on_the_command_line_is_refused(arguments, field):
    with pytest.raises(ConfigError) as caught:
        distributed.initialize(**arguments)
    assert str(caught.value).startswith(field)


def test_agreement_is_trivial_alone():
    assert distributed.broadcast("name", {"a": (1, 2)}) == {"a": [1, 2]}
    assert distributed.gather("name", 3) == [3]
    distributed.barrier("name")
    assert distributed.is_lead()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def roll(address: str, places: list[tuple[int, int, str]], seconds: float) -> list[str]:
    """Call the roll from one thread per (process, processes, token); what each of them got."""
    results = [""] * len(places)

    def one(index: int, process: int, processes: int, token: str) -> None:
        try:
            rollcall.call(address, processes, process, timeout_seconds=seconds, token=token)
            results[index] = "go"
        except (TimeoutError, RuntimeError) as error:
            results[index] = f"{error} ({type(error).__name__} of {getattr(error, 'accuses', ())})"

    threads = [
        threading.Thread(target=one, args=(index, *place)) for index, place in enumerate(places)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_present_go():
    places = [(process, 5, "run") for process in range(5)]
    assert roll(free_address(), places, 30) == ["go"] * 5


def test_a_process_of_another_gang_is_not_counted():
    results = roll(free_address(), [(0, 2, "mine"), (1, 2, "other")], 1)
    assert "process(es) 1 of 2 never came within 1 s" in results[0]
    assert "process 0 of 2 never came" in results[1]


def test_two_processes_of_one_id_are_an_error():
    results = roll(free_address(), [(0, 3, "run"), (1, 3, "run"), (1, 3, "run")], 30)
    assert all("call themselves 1" in result for result in results)
    assert all("(RuntimeError of" in result for result in results)


def test_all_that_came_accuse_those_that_did_not():
    results = roll(free_address(), [(0, 4, "run"), (2, 4, "run")], 0.5)
    assert all("process(es) 1, 3 of 4 never came" in result for result in results)
    assert all("(AbsentError of (1, 3))" in result for result in results)
    (alone,) = roll(free_address(), [(1, 2, "run")], 0.2)
    assert "(AbsentError of (0,))" in alone


def test_strangers_on_the_port_do_no_harm():
    address = free_address()
    host, port = address.split(":")
    lead = threading.Thread(
        target=rollcall.call, args=(address, 2, 0), kwargs={"timeout_seconds": 30, "token": "run"}
    )
    lead.start()
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[1]\n"):
        while True:
            try:
                with socket.create_connection((host, int(port))) as stranger:
                    stranger.sendall(words)
                break
            except ConnectionRefusedError:
                continue
    rollcall.call(address, 2, 1, timeout_seconds=30, token="run")
    lead.join(30)
    assert not lead.is_alive()


@pytest.mark.parametrize(
    ("address", "bind"),
    [
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("localhost:80", "127.0.0.1:80"),
        ("[::1]:80", "[::1]:80"),
        ("node17:80", None),
        ("10.0.0.3:80", None),
    ],
)
def test_a_gang_on_loopback_is_not_open_to_the_network(address, bind):
    assert rollcall.bind_address(address) == bind
