"""Before `jax.distributed` starts: does every process of the gang come, and who does not?

The lead listens on the coordinator's own port, which nobody uses until its service starts there,
so no second port has to be agreed on. Each process says which one it is and waits for the word to
go on. When the time is over, the lead tells those present who is missing, and all of them end with
that message.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Iterable, Mapping, Sequence

_MAGIC = "muster-rollcall-1"
_GO = {"go": True}


class AbsentError(TimeoutError):
    """Other processes did not come; the launcher asks those what became of them.

    Attributes:
      accuses: their ids.
    """

    def __init__(self, message: str, accuses: Sequence[int]):
        super().__init__(message)
        self.accuses = tuple(accuses)


def is_address(address: str) -> bool:
    """Is this `host:port`?"""
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536


def bind_address(address: str) -> str | None:
    """Where process 0's service should listen: loopback only, if the gang lives there.

    None means JAX's default, all interfaces: a host's name may not be an address of its own.
    """
    host, _, port = address.rpartition(":")
    if host == "localhost":
        return f"127.0.0.1:{port}"
    return address if _is_loopback(host.strip("[]")) else None


def call(
    address: str, num_processes: int, process_id: int, *, timeout_seconds: float, token: str
) -> None:
    """Wait until all processes are there. Collective: every process must call this.

    Args:
      address: `host:port` at which process 0 will serve `jax.distributed`.
      num_processes: processes in the gang.
      process_id: this process, in `[0, num_processes)`; 0 listens.
      timeout_seconds: how long to wait.
      token: the gang's own word: whoever brings another belongs to another gang.

    Raises:
      AbsentError: some never came; the text names them.
      RuntimeError: the port is taken, or two processes have one id.
    """
    if num_processes == 1:
        return
    hello = {"magic": _MAGIC, "token": token, "processes": num_processes, "process": process_id}
    deadline = time.monotonic() + timeout_seconds
    if process_id == 0:
        _listen(address, hello, deadline, timeout_seconds)
    else:
        _answer(address, hello, deadline, timeout_seconds)


def wait_for_service(address: str, patience_seconds: float = 5.0) -> None:
    """After the roll call, wait until process 0 listens again, now as JAX's service.

    A client of JAX's that comes too early tries again only after a second.
    """
    host, _, port = address.rpartition(":")
    limit = time.monotonic() + patience_seconds
    while time.monotonic() < limit:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except OSError:
            time.sleep(0.005)
        else:
            return


def _listen(
    address: str, hello: dict[str, object], deadline: float, timeout_seconds: float
) -> None:
    """Process 0: take the names, then give the word to all of them at once."""
    number = int(str(hello["processes"]))
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(address))
        while len(present) < number - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            stack.enter_context(connection)
            said = _hear(connection, deadline=time.monotonic() + 2.0)
            if said is None or {**said, "process": 0} != {**hello, "process": 0}:
                _say(connection, {"error": "this is another gang's coordinator"})
                connection.close()
            elif said["process"] in present or said["process"] == 0:
                problem = f"two processes of this gang call themselves {said['process']}"
                _dismiss([*present.values(), connection], problem)
                raise RuntimeError(f"{problem}; see how they were started")
            else:
                present[said["process"]] = connection
        missing = sorted(set(range(1, number)) - set(present))
        if missing:
            problem = (
                f"process(es) {', '.join(map(str, missing))} of {number} never came within "
                f"{timeout_seconds:g} s; see their logs"
            )
            _dismiss(present.values(), problem, missing)
            raise AbsentError(problem, missing)
        server.close()  # The next to listen there is JAX's service.
        for connection in present.values():
            _say(connection, _GO)


def _dismiss(
    connections: Iterable[socket.socket], problem: str, missing: Sequence[int] = ()
) -> None:
    for connection in connections:
        _say(connection, {"error": problem, "missing": list(missing)})


def _answer(
    address: str, hello: dict[str, object], deadline: float, timeout_seconds: float
) -> None:
    """Every other process: say who it is, as soon as process 0 listens, and wait for the word."""
    host, _, port = address.rpartition(":")
    problem = "nothing listened"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0) as connection:
                _say(connection, hello)
                # The lead may have started later, and ends the wait by its own clock.
                said = _hear(connection, deadline=deadline + timeout_seconds)
        except OSError as error:
            problem = str(error)
            said = None
        if said == _GO:
            return
        if said and "error" in said and "another gang" not in str(said["error"]):
            if not said.get("missing"):
                raise RuntimeError(str(said["error"]))
            raise AbsentError(str(said["error"]), said["missing"])
        problem = str(said["error"]) if said and "error" in said else problem
        time.sleep(0.05)
    raise AbsentError(
        f"process 0 of {hello['processes']} never came within {timeout_seconds:g} s: no roll call "
        f"at {address} ({problem}); see its log",
        accuses=(0,),
    )


def _server(address: str) -> socket.socket:
    """Listen where JAX's service will.

    Raises:
      RuntimeError: somebody else holds the port for longer than a closing socket would.
    """
    patience = time.monotonic() + 3.0
    while True:
        try:
            return _bind(bind_address(address), int(address.rpartition(":")[2]))
        except OSError as error:
            if time.monotonic() > patience:
                raise RuntimeError(
                    f"process 0 cannot listen at {address}: {error.strerror}; give the gang "
                    "another coordinator port"
                ) from error
        time.sleep(0.1)


def _bind(where: str | None, port: int) -> socket.socket:
    # Shared, as gRPC's own: the agent that chose the port holds it bound all the while.
    if where is None and socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096, reuse_port=True
        )
    name = where.rpartition(":")[0].strip("[]") if where else ""
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    return socket.create_server((name, port), family=family, backlog=4096, reuse_port=True)


def _say(connection: socket.socket, message: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):  # Who has gone meanwhile needs no answer.
        connection.sendall(json.dumps(message).encode() + b"\n")


def _hear(connection: socket.socket, *, deadline: float) -> dict | None:
    """One line of JSON; None when the other side falls silent, goes, or speaks otherwise."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 65536:
        try:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            part = connection.recv(4096)
        except OSError:
            return None
        if not part:
            return None
        data += part
    try:
        said = json.loads(data)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
