"""The `gcloud` command line, and what its errors mean."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from launch import command
from launch.spec import ConfigError
from launch.spec.tpu import TpuSpec

# Nobody is there to be asked, and what is printed is for a program.
ALWAYS = ("--quiet", "--format=json")
QUICK_SECONDS = 120.0  # gcloud itself tries what failed again for half a minute.
LONG_SECONDS = 3600.0  # For what follows an operation to its end.
_MOST_CHARACTERS = 1000  # Of what is told of an error.

STOCKOUT = "stockout"
QUOTA = "quota"
EXISTS = "exists"
MISSING = "missing"
UNAVAILABLE = "unavailable"  # For now: asked again, it may answer.
FAILED = "failure"  # What was begun came to nothing, through no fault of the user's.

# google.rpc.Code, as far as operations end with them.
_CODES = {
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
}

# What tells them apart, in this order; the kind, and what to do. Of Google's error texts only words
# are looked for that name the thing, for sentences change.
_KINDS: tuple[tuple[str, str, str], ...] = (
    (
        r"no more capacity|stockout|out of capacity|insufficient capacity",
        STOCKOUT,
        "try other zones (tpu.zones), tpu.provisioning='spot', or wait with tpu.way='queued'",
    ),
    (
        # Of requests: never a reason to give up, though it is called a quota too.
        r"per minute|per second|RATE_LIMIT_EXCEEDED|rateLimitExceeded|[Rr]ate limit",
        UNAVAILABLE,
        "",
    ),
    (
        r"quota.{0,200}exceeded|exceeded.{0,80}quota|Quota limit",
        QUOTA,
        "free machines (`muster gc` finds forgotten ones), ask for more quota at "
        "console.cloud.google.com/iam-admin/quotas, or take a smaller accelerator",
    ),
    (
        r"SERVICE_DISABLED|has not been used in project|it is disabled",
        "disabled",
        "enable it: gcloud services enable tpu.googleapis.com",
    ),
    (
        r"locations/[^'\" ]+['\"]? ?\(or it may not exist\)|[Ll]ocation .{0,120}not found"
        r"|is not a valid (zone|location)|unexpected location|Location .{0,80}is not valid",
        "zone",
        "the zone does not exist, or the project may not use it; `gcloud compute tpus locations "
        "list` shows those there are",
    ),
    (
        r"[Aa]ccelerator ?[Tt]ype.{0,200}(not|invalid|unknown)|(invalid|unknown) accelerator",
        "accelerator",
        "the zone does not have this type; `gcloud compute tpus accelerator-types list "
        "--zone=ZONE` shows those it has",
    ),
    (
        r"runtime.?version.{0,120}(not|invalid)|(invalid|unknown) runtime",
        "runtime version",
        "`gcloud compute tpus versions list --zone=ZONE` shows those there are",
    ),
    (
        r"active account|gcloud auth login|[Rr]eauthentication|refreshing your current auth"
        r"|UNAUTHENTICATED|invalid authentication|application-default",
        "login",
        "log in: gcloud auth login",
    ),
    (
        r"PERMISSION_DENIED|\b403\b|does not have permission|Required .{0,80} permission",
        "permission",
        "your account needs the role roles/tpu.admin in the project, and "
        "roles/iam.serviceAccountUser on the VMs' service account",
    ),
    (r"ALREADY_EXISTS|already exists|\b409\b", EXISTS, ""),
    (r"NOT_FOUND|was not found|not found|\b404\b", MISSING, ""),
    (
        r"UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|\b(429|500|502|503|504)\b"
        r"|[Cc]onnection|timed? ?out|Temporary failure|Remote end closed|gave no answer",
        UNAVAILABLE,
        "",
    ),
)


class GcloudError(Exception):
    """gcloud did not do what it was asked for.

    Attributes:
      kind: STOCKOUT, QUOTA, EXISTS, MISSING, UNAVAILABLE, FAILED, or another word for what it is.
      said: its own words, in one line.
      advice: what to do; "" where there is nothing.
      begun: whether what was asked for may have been begun all the same.
    """

    def __init__(self, kind: str, said: str, advice: str = "", begun: bool = True):
        self.kind = kind
        self.said = said
        self.advice = advice
        self.begun = begun
        super().__init__(f"{kind}: {said}" + (f"; {advice}" if advice else ""))

    @property
    def passes(self) -> bool:
        """Whether it may be different a little later, with the user doing nothing."""
        return self.kind in (STOCKOUT, UNAVAILABLE, FAILED)


def understand(text: str) -> GcloudError:
    """What an error of gcloud's means."""
    said = _one_line(text)
    found = re.search(r"^\{.*\}$|\{\"error\": ?\{.*\}\}", said)
    record = _error_record(found[0]) if found else {}
    if "code" in record and "message" in record:
        # Without any words around it: of an operation, which was begun and is over.
        if found and found[0] == said:
            return of_operation(record)
        said = f"{record.get('status') or record['code']}: {record['message']}"
    return _classified(said)


def of_operation(error: Mapping[str, Any]) -> GcloudError:
    """What an error means with which the API's work on something has ended."""
    code = _CODES.get(error.get("code", 0), "")
    understood = _classified(f"{code}: {error.get('message') or 'no reason is given'}".lstrip(": "))
    understood.begun = True
    if understood.kind in (UNAVAILABLE, "gcloud"):
        understood.kind = FAILED
    return understood


def _classified(said: str) -> GcloudError:
    for pattern, kind, advice in _KINDS:
        if re.search(pattern, said):
            return GcloudError(kind, said, advice, begun=kind == UNAVAILABLE)
    return GcloudError("gcloud", said)


def _error_record(text: str) -> Mapping[str, Any]:
    """An error as Google's APIs write it; {} if it is none."""
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    inner = record.get("error")
    return inner if isinstance(inner, dict) else record


def _one_line(text: str) -> str:
    """gcloud's own words without its warnings and decoration."""
    start = text.rfind("ERROR:")
    said = " ".join(text[max(start, 0) :].split())
    said = re.sub(r"^ERROR: (\([\w.-]+\) )?", "", said)
    said = re.sub(r" ?This command is authenticated (with|as) .{0,600}? property\]?\.?", "", said)
    return said[:_MOST_CHARACTERS] or "it said nothing"


def run(
    argv: Sequence[str],
    *,
    timeout_seconds: float = QUICK_SECONDS,
    json_output: bool = True,
    over: threading.Event | None = None,
) -> Any:
    """Run a gcloud command; what it prints.

    Args:
      argv: as `commands` gives it.
      timeout_seconds: how long it may take.
      json_output: whether that is JSON.
      over: when it is set, the command is killed.

    Raises:
      GcloudError: it failed.
    """
    done = command.run(argv, timeout_seconds=timeout_seconds, over=over, bound=True)
    if not done.ok:
        raise understand(done.err or done.out or done.last_word)
    if not json_output:
        return done.out
    try:
        return json.loads(done.out) if done.out.strip() else {}
    except ValueError:
        raise GcloudError("gcloud", f"no JSON: {done.out[:200]!r}") from None


def project_of(spec: TpuSpec) -> str:
    """The project in which a run's machines are: what gcloud is set to may change meanwhile.

    Raises:
      ConfigError: there is none.
    """
    if spec.project is not None:
        return spec.project
    try:
        settings = run(["gcloud", "config", "list", *ALWAYS])
    except GcloudError as error:
        raise ConfigError("", f"gcloud does not tell its settings: {error}") from None
    project = (settings.get("core") or {}).get("project")
    if not project:
        rule = "is not said, and gcloud has none; set it, or: gcloud config set project PROJECT"
        raise ConfigError("cluster.tpu.project", rule, None)
    return str(project)


def check_installed() -> None:
    """Refuse to go on without gcloud and ssh.

    Raises:
      ConfigError: there is none.
    """
    for name, advice in (
        ("gcloud", "install it: cloud.google.com/sdk/docs/install"),
        ("ssh", "install OpenSSH's client"),
    ):
        if shutil.which(name) is None:
            rule = f"backend 'tpu' needs the command `{name}`, which is not on the PATH; {advice}"
            raise ConfigError("", rule)
