"""What `muster doctor` runs on each node of a job: looks around, and says it in a file.

Standard library only; `main` is a task of srun, one on each node.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path

from launch.environment import look

PLAN = "plan.json"  # From the doctor.
_DOOR = "door.json"  # From the first node.
_MEET_SECONDS = 60.0


def main(folder: str) -> None:
    """Look around on this node.

    Args:
      folder: the doctor's, on the shared file system.
    """
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    found: dict[str, object] = {"node": node, "cpus": len(os.sched_getaffinity(0))}
    plan = _plan(Path(folder), found)
    found["visible"] = {
        name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS")
    }
    if plan is not None:
        found["environment"] = look(plan["python"], plan["env"])
        found["met"] = _meet(Path(folder), plan["token"])
    try:
        path = Path(folder) / f"node-{node}.json"
        path.with_suffix(".tmp").write_text(json.dumps(found))
        path.with_suffix(".tmp").rename(path)
    except OSError as error:
        print(f"{node}: cannot write in {folder}: {error}", file=sys.stderr)


def _plan(folder: Path, found: dict[str, object]) -> dict | None:
    try:
        return json.loads((folder / PLAN).read_text())
    except (OSError, ValueError) as error:
        found["unseen"] = str(error)
        return None


def _meet(folder: Path, token: str) -> str:
    """Exchange a word with the first node over a port; "" when that worked."""
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    others = int(os.environ.get("SLURM_NTASKS", "1")) - 1
    try:
        return _host(folder, token, others) if rank == 0 else _visit(folder, token)
    except OSError as error:
        return str(error)


def _host(folder: Path, token: str, others: int) -> str:
    # The job's own interface: where the other nodes see the node on which srun was called.
    address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or socket.gethostname()
    with socket.create_server((address, 0)) as listener:
        listener.settimeout(_MEET_SECONDS)
        where = {"address": address, "port": listener.getsockname()[1]}
        (folder / "door.tmp").write_text(json.dumps(where))
        (folder / "door.tmp").rename(folder / _DOOR)
        came = 0
        with contextlib.suppress(TimeoutError):
            while came < others:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(_MEET_SECONDS)
                    if connection.recv(256) == token.encode():
                        connection.sendall(token[::-1].encode())
                        came += 1
    return "" if came == others else f"{came} of {others} other nodes came to {address}"


def _visit(folder: Path, token: str) -> str:
    limit = time.monotonic() + _MEET_SECONDS
    while not (folder / _DOOR).exists():
        if time.monotonic() > limit:
            return "the first node's file was never seen"
        time.sleep(0.2)
    where = json.loads((folder / _DOOR).read_text())
    address = (where["address"], where["port"])
    with socket.create_connection(address, _MEET_SECONDS) as connection:
        connection.sendall(token.encode())
        answer = connection.recv(256)
    return "" if answer == token[::-1].encode() else f"{address[0]} gave another answer"
