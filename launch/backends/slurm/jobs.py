"""jobs.json: every SLURM job that was ever asked for in a run, written before it is asked for."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

from launch import contract, rundir
from launch.backends.slurm import client
from launch.backends.slurm.client import Job
from launch.contract import utc

JOBS = "jobs.json"  # The newest last.


@dataclasses.dataclass
class AskedJob:
    """A job that was asked for.

    Attributes:
      comment: by which SLURM knows it as well; written before it is asked for.
      asked_at: UTC ISO 8601.
      job_id: SLURM's; None as long as there was no answer.
      end: how it ended, once that is known: SLURM's state, or `refused`.
    """

    comment: str
    asked_at: str
    job_id: str | None = None
    end: str | None = None


def asked_jobs(run: Path) -> list[AskedJob]:
    """All jobs that were asked for in this run, the newest last."""
    record = rundir.read_record(run / JOBS) or {}
    names = [field.name for field in dataclasses.fields(AskedJob)]
    return [AskedJob(**{name: one.get(name) for name in names}) for one in record.get("jobs", ())]


def open_job(run: Path) -> AskedJob | None:
    """The newest job, if it was not seen to end."""
    jobs = asked_jobs(run)
    return jobs[-1] if jobs and jobs[-1].end is None else None


def write_job(run: Path, job: AskedJob) -> None:
    """Add a job, or change what is said of it. It is on disk when this returns."""
    jobs = [other for other in asked_jobs(run) if other.comment != job.comment]
    record = {"schema": contract.SCHEMA, "jobs": [vars(one) for one in (*jobs, job)]}
    rundir.write_private(run / JOBS, record)
    for path in (run / JOBS, run):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def new_job(run_id: str) -> AskedJob:
    """A job that is about to be asked for."""
    return AskedJob(f"muster:{run_id}:{os.urandom(4).hex()}", utc(time.time()))


def settle(run: Path) -> tuple[AskedJob, Job | None] | None:
    """The newest job, if it may still run, and what SLURM says of it; else writes down its end.

    Raises:
      client.UnavailableError: SLURM gives no answer.
    """
    asked = open_job(run)
    if asked is None:
        return None
    if asked.job_id is None:
        asked.job_id = client.find_by_comment(asked.comment)
    job = client.job(asked.job_id) if asked.job_id else None
    if job is not None and job.active:
        return asked, job
    asked.end = job.state if job else ("refused" if asked.job_id is None else "unknown")
    write_job(run, asked)
    return None


def cancel(run: Path, job_id: str) -> None:
    """Cancel a job that does not run yet.

    Raises:
      client.UnavailableError: SLURM gives no answer.
    """
    client.cancel(job_id)
    asked = open_job(run)
    if asked is not None and asked.job_id == job_id:
        asked.end = "CANCELLED"
        write_job(run, asked)
