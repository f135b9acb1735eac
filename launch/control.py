"""Puts together what runs a gang: the records, the supervisor and its controller."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from launch import registry, rundir
from launch.console import Console
from launch.controller import Backend, Controller
from launch.ownership import RunDir
from launch.request import Request, code_version, fits, run_record
from launch.restart import Outcome
from launch.stop import StopRequests
from launch.supervise import Policy, Supervisor


def record_run(request: Request, run_dir: RunDir) -> threading.Thread:
    """Write run.json, and remember the run for `muster list`.

    Returns:
      A thread that adds the code's version, for the gang need not wait for git; to be joined before
      the run directory is given back.
    """
    record = run_record(request)
    run_dir.write_run(**record, code=None)
    registry.register(run_dir)

    def write() -> None:
        run_dir.write_run(**record, code=code_version())

    version = threading.Thread(target=write, daemon=True)
    version.start()
    return version


def control(
    request: Request,
    run_dir: RunDir,
    backend: Backend,
    hosts: tuple[str, ...],
    *,
    on_started: Callable[[], None] = lambda: None,
    history: tuple[Outcome, ...] = (),
    requests: StopRequests | None = None,
    stops_at_once: bool = False,
    **policy: Any,
) -> Controller:
    """The controller of a run, ready to run.

    Args:
      request: what to run.
      run_dir: held by this process.
      backend: starts agents.
      hosts: where.
      on_started: called once the gang has started.
      history: attempts that count against the budgets.
      requests, stops_at_once: see Controller.
      **policy: further fields of Policy.
    """
    cluster = request.cluster
    supervisor = Supervisor(
        Policy(
            hosts=hosts,
            processes_per_host=cluster.processes_per_host,
            grace_seconds=cluster.grace_seconds,
            restart=cluster.restart,
            watch=cluster.watch,
            hosts_min=cluster.hosts_min,
            fits=lambda number: fits(request, number),
            reports=request.config is not None,
            furthest_step=rundir.furthest_step(run_dir.path),
            history=history,
            rng=random.Random(),
            **policy,
        )
    )
    console = Console(
        request.shown,
        request.prefixed,
        # The trainer's word on a wrong config is the launcher's last one too.
        held_back=b"error: " if request.config is not None else b"",
    )
    return Controller(
        run_dir,
        supervisor,
        backend,
        console,
        on_started=on_started,
        requests=requests,
        stops_at_once=stops_at_once,
    )
