"""SLURM's commands, and what they answer. Only what works without slurmdbd is used."""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Mapping, Sequence

from launch import command
from launch.spec import ConfigError
from launch.spec.slurm import seconds_of_limit

QUICK_SECONDS = 10.0  # For a question; slurmctld may be slow.
SUBMIT_SECONDS = 60.0  # For sbatch, which tries again by itself for a while.
# Of `JobState`: a job in one of these may still run, or run again.
ACTIVE: tuple[str, ...] = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
)
ACTIVE += ("SIGNALING", "STAGE_OUT", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
# Reasons of a pending job that no time will change, only another request or an administrator.
_STUCK: tuple[str, ...] = (
    "PartitionTimeLimit",
    "PartitionNodeLimit",
    "PartitionConfig",
    "BadConstraints",
)
_STUCK += ("DependencyNeverSatisfied", "InvalidAccount", "InvalidQOS", "AccountNotAllowed")
_STUCK += ("QOSNotAllowed", "QOSTimeLimit", "QOSMaxWallDurationPerJobLimit")
_UNKNOWN_JOB = "Invalid job id specified"
# What sbatch says when the request itself is wrong, and no other time will do.
_MOMENTARY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection (refused|reset|timed out)"
    r"|temporarily|Resource temporarily unavailable|Zero Bytes were transmitted|gave no answer"
    r"|Slurm backup controller in standby|Transport endpoint|Unable to establish"
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A job, as `scontrol show job` tells of it. Times are seconds since the epoch.

    Attributes:
      id: SLURM's number.
      state: RUNNING, PENDING, COMPLETED, ...
      reason: why it is pending, or how it ended.
      restarts: how often it was put back into the queue.
      partition: where.
      start_at: when it started, or is expected to; None if unknown.
      end_at: when its time is over; None without a limit.
      preempted_at: when SLURM has begun to take it away; None if it has not.
      exit_code: of the batch script.
    """

    id: str
    state: str
    reason: str
    restarts: int
    partition: str
    start_at: float | None
    end_at: float | None
    preempted_at: float | None
    exit_code: int

    @property
    def active(self) -> bool:
        """Whether it runs or may yet run."""
        return self.state in ACTIVE

    @property
    def why_pending(self) -> str:
        """Why it waits, in words; and that it does so in vain, if that is certain."""
        if self.reason in _STUCK:
            return f"{self.reason}, with which it never starts; `muster doctor` says what to change"
        return self.reason or "SLURM has not looked at it yet"


class UnavailableError(Exception):
    """SLURM gave no answer; later it may."""


def check_installed() -> None:
    """Raise ConfigError unless SLURM's commands are there."""
    for name in ("sbatch", "scontrol", "scancel"):
        if shutil.which(name) is None:
            raise ConfigError(
                "cluster.backend",
                f"no SLURM on this machine: {name} is not on the PATH; start from a login node, "
                "or load its module",
                "slurm",
            )


def submit(script: str, env: Mapping[str, str]) -> str:
    """Submit a batch script; the job's id.

    Args:
      script: its path.
      env: what the job inherits over this process's own environment.

    Raises:
      ConfigError: SLURM refuses it; the text says why.
      UnavailableError: no answer; whether it was taken is not known.
    """
    argv = ["sbatch", "--parsable", script]
    done = command.run(argv, timeout_seconds=SUBMIT_SECONDS, env=env)
    if done.ok:
        # With several clusters: `ID;CLUSTER`.
        return done.out.strip().splitlines()[-1].partition(";")[0]
    said = "; ".join(line.removeprefix("sbatch: ") for line in done.err.strip().splitlines())
    if done.exit_code is None or _MOMENTARY.search(said):
        raise UnavailableError(said)
    if "configuration source" in said:
        rule = (
            "SLURM is installed here and finds no configuration: start from a login node, or set "
        )
        raise ConfigError("cluster.backend", rule + "SLURM_CONF to its slurm.conf", "slurm")
    raise ConfigError("cluster.slurm", f"SLURM refuses the job: {said}; correct {_field(said)}")


_FIELDS = (
    ("partition", r"partition"),
    ("time", r"time limit"),
    ("account", r"account"),
    ("qos", r"\bqos\b"),
    ("constraint", r"feature"),
    ("gpus_per_node", r"node configuration|Gres|generic resource"),
    ("reservation", r"reservation"),
    ("dependency", r"dependency"),
)


def _field(said: str) -> str:
    for name, words in _FIELDS:
        if re.search(words, said, re.IGNORECASE):
            return f"--cluster.slurm.{name}"
    return "it, see `muster doctor`"


def jobs(job_id: str, timeout_seconds: float = QUICK_SECONDS) -> list[Job]:
    """The job, or the jobs of an array; [] when SLURM knows it no more.

    Raises:
      UnavailableError: no answer.
    """
    argv = ["scontrol", "--oneliner", "show", "job", job_id]
    done = command.run(argv, timeout_seconds=timeout_seconds)
    if done.ok:
        return [parse_job(line) for line in done.out.splitlines() if line.startswith("JobId=")]
    if _UNKNOWN_JOB in done.err:
        return []
    raise UnavailableError(done.last_word)


def job(job_id: str, timeout_seconds: float = QUICK_SECONDS) -> Job | None:
    """One job; of an array one that is active, if there is any; None when SLURM knows it no more.

    Raises:
      UnavailableError: no answer.
    """
    found = jobs(job_id, timeout_seconds) or ended(job_id)
    running = [one for one in found if one.state != "PENDING" and one.active]
    return next(iter(running + [one for one in found if one.active] + found), None)


def ended(job_id: str) -> list[Job]:
    """A job that slurmctld has forgotten, from its accounting or its completion log; [] where the
    site keeps neither, or this user may not read it."""
    for source in ([], ["--completion"]):
        argv = ["sacct", *source, f"--jobs={job_id}", "--parsable2", "--noheader"]
        done = command.run([*argv, "--format=State,ExitCode"], timeout_seconds=QUICK_SECONDS)
        lines = done.out.split("\n") if done.ok else []
        words = [line.split("|") for line in lines if "|" in line]
        if words:  # The newest start of the job is the last; `CANCELLED by 1000`.
            state, code = words[-1][0].split()[0], words[-1][1]
            return [parse_job(f"JobId={job_id} JobState={state} ExitCode={code}")]
    return []


def parse_job(line: str) -> Job:
    """One line of `scontrol --oneliner show job`."""
    words = dict(re.findall(r"(?:^| )([A-Za-z][\w/:.-]*)=(.*?)(?= [A-Za-z][\w/:.-]*=|\s*$)", line))
    code = words.get("ExitCode", "0:0").partition(":")[0]
    return Job(
        id=words["JobId"],
        state=words.get("JobState", ""),
        reason=words.get("Reason", "").replace("None", ""),
        restarts=int(words.get("Restarts", "0")),
        partition=words.get("Partition", ""),
        start_at=_time(words.get("StartTime")),
        end_at=_time(words.get("EndTime"))
        if seconds_of_limit(words.get("TimeLimit", "")) is not None
        or _time(words.get("PreemptTime")) is not None
        else None,
        preempted_at=_time(words.get("PreemptTime")),
        exit_code=int(code),
    )


def _time(text: str | None) -> float | None:
    """A local time of SLURM's; None for `Unknown`, `N/A`, `None`."""
    try:
        return time.mktime(time.strptime(text or "", "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def find_by_comment(comment: str) -> str | None:
    """The id of this user's job with a comment; None if SLURM has none.

    Raises:
      UnavailableError: no answer.
    """
    argv = ["squeue", "--me", "--noheader", "--states=all", "--format=%A|%k"]
    done = command.run(argv, timeout_seconds=QUICK_SECONDS * 2)
    if not done.ok:
        raise UnavailableError(done.last_word)
    found = [line.split("|", 1) for line in done.out.splitlines() if "|" in line]
    return next((number for number, said in found if said == comment), None)


def cancel(job_id: str) -> None:
    """Cancel a job, whatever it is doing.

    Raises:
      UnavailableError: no answer.
    """
    done = command.run(["scancel", job_id], timeout_seconds=QUICK_SECONDS)
    if not done.ok and _UNKNOWN_JOB not in done.err:
        raise UnavailableError(done.last_word)


def cancel_pending(job_id: str) -> None:
    """Cancel what of an array has not started yet.

    Raises:
      UnavailableError: no answer.
    """
    argv = ["scancel", "--state=PENDING", job_id]
    done = command.run(argv, timeout_seconds=QUICK_SECONDS)
    if not done.ok and _UNKNOWN_JOB not in done.err:
        raise UnavailableError(done.last_word)


def requeue(job_id: str) -> command.Done:
    """Put this very job back into the queue."""
    return command.run(["scontrol", "requeue", job_id], timeout_seconds=QUICK_SECONDS)


def keep_off(job: Job, names: Sequence[str], needed: int) -> bool:
    """Keep a job that waits in the queue off some nodes, if its partition has enough others.

    Args:
      job: that waits.
      names: of the nodes.
      needed: how many nodes it needs.

    Returns:
      Whether it is kept off them.
    """
    argv = ["scontrol", "--oneliner", "show", "partition", job.partition]
    said = command.run(argv, timeout_seconds=QUICK_SECONDS)
    total = re.search(r"\bTotalNodes=(\d+)", said.out)
    if total is None or int(total.group(1)) < needed + len(names):
        return False  # It would wait for ever.
    argv = ["scontrol", "update", f"JobId={job.id}", f"ExcNodeList={','.join(names)}"]
    return command.run(argv, timeout_seconds=QUICK_SECONDS).ok


def nodes(names: str) -> dict[str, dict[str, str]]:
    """What `scontrol show node` says of each node of a list: its words.

    Raises:
      UnavailableError: no answer.
    """
    argv = ["scontrol", "--oneliner", "show", "node", names]
    done = command.run(argv, timeout_seconds=QUICK_SECONDS)
    if not done.ok:
        raise UnavailableError(done.last_word)
    found = {}
    for line in done.out.splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "NodeName" in words:
            found[words["NodeName"]] = words
    return found


def kill_wait_seconds() -> float:
    """How long SLURM waits between asking a job's processes to end and killing them."""
    done = command.run(["scontrol", "show", "config"], timeout_seconds=QUICK_SECONDS)
    found = re.search(r"^KillWait\s*=\s*(\d+)", done.out, re.MULTILINE)
    return float(found.group(1)) if found else 30.0
