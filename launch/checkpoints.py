"""`muster checkpoints`: a run's checkpoints at rest. What reads them is a process of the trainer's
own, `python -m trainer.checkpoints`, which imports no jax."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command, contract, registry, rundir
from launch.console import print_all
from launch.errors import ConfigError, closest
from launch.program import trainer_env
from launch.standing import standing
from launch.table import table
from launch.times import ago, duration, seconds_of

_LIMIT_SECONDS = 7 * 86400.0  # Against hanging only: there are checkpoints of many TB.
_NAMED = 4  # Damaged leaves that are told by name; --json has them all.
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# Actions and the flags that they take.
_ACTIONS: dict[str, tuple[str, ...]] = {
    "list": ("json",),
    "verify": ("json",),
    "delete": ("json",),
    "copy": ("json",),
    "export": ("json", "ema"),
}


def checkpoints(arguments: Sequence[str], flags: Mapping[str, str]) -> int:
    """List a run's checkpoints, or verify, delete, copy or export some.

    Args:
      arguments: RUN, then maybe an action and its arguments.
      flags: json, ema.

    Returns:
      The exit code: EXIT_FAILED if a step is damaged.

    Raises:
      ConfigError: what is asked for cannot be.
    """
    if not arguments:
        raise ConfigError("", "muster checkpoints needs a RUN, see `muster list`")
    run, action, *rest = [*arguments, "list"] if len(arguments) == 1 else list(arguments)
    if action not in _ACTIONS:
        raise ConfigError("", f"no action {action!r}; {closest(action, _ACTIONS)}")
    for flag in flags:
        if flag not in _ACTIONS[action]:
            raise ConfigError(f"--{flag}", f"is not a flag of muster checkpoints RUN {action}")
    least, words = {
        "list": (0, ""),
        "verify": (0, "[STEP...]"),
        "delete": (1, "STEP..."),
        "copy": (2, "STEP DIR"),
        "export": (2, "STEP FILE.safetensors"),
    }[action]
    if len(rest) < least or (len(rest) > least and action not in ("verify", "delete")):
        usage = f"muster checkpoints RUN {action} {words}".strip()
        raise ConfigError("", f"write: {usage}; got {rest}")
    path, directory = _find(run)
    options = ["--ema"] if "ema" in flags else []
    if action == "delete":
        options += _live(path)
    try:
        report, code = _ask(action, directory, options, rest)
    except RuntimeError as error:  # Not the user's mistake; what it printed says more.
        print(f"muster: error: {error}", file=sys.stderr)
        return contract.EXIT_FAILED
    print_all(json.dumps(report, indent=1) if "json" in flags else _TEXTS[action](report))
    return code


def _find(run: str) -> tuple[Path, str]:
    """The run directory here, and where its checkpoints are."""
    plain = Path(run).expanduser().absolute()
    is_foreign = not (plain / contract.RUN_RECORD).exists()
    if is_foreign and (plain / contract.CHECKPOINTS).is_dir():  # Of another launcher, or a copy.
        return plain, str(plain / contract.CHECKPOINTS)
    path = registry.find(run)
    url = run.rstrip("/") if run.startswith("gs://") else _storage(path)
    return path, f"{url or path}/{contract.CHECKPOINTS}"


def _storage(path: Path) -> str | None:
    """Where a run on machines that come and go keeps what lasts; None for the run directory."""
    from launch.backends.tpu import published

    remote = published.place("gs://")
    if path.is_relative_to(remote):
        return f"gs://{path.relative_to(remote)}"
    record = rundir.read_record(path / contract.RUN_RECORD) or {}
    base = ((record.get("cluster") or {}).get("tpu") or {}).get("storage")
    return f"{str(base).rstrip('/')}/{path.name}-{record.get('id')}" if base else None


def _live(path: Path) -> list[str]:
    """Whether a run uses them now, and may be reading them."""
    stands = standing(path)
    if not stands.running:
        return []
    processes = stands.live.processes if stands.live else ()
    at_a_step = processes and all(p.phase not in (None, "init", "restore") for p in processes)
    return [f"--live={'running' if at_a_step else 'starting'}"]


def _ask(
    action: str, directory: str, options: Sequence[str], words: Sequence[str]
) -> tuple[dict[str, Any], int]:
    """Run the trainer's part, to its end; its report and exit code.

    Raises:
      ConfigError: what it refuses.
      RuntimeError: it failed otherwise.
    """
    argv = [sys.executable, "-m", "trainer.checkpoints", action, *options, "--", directory, *words]
    done = command.run(argv, timeout_seconds=_LIMIT_SECONDS, env=trainer_env({}), bound=True)
    try:
        report = json.loads(done.out)
    except ValueError:
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        if done.exit_code == contract.EXIT_CONFIG and errors:
            raise ConfigError("", errors[-1].removeprefix("error: ")) from None
        print(done.err, file=sys.stderr, end="")
        raise RuntimeError(f"python -m trainer.checkpoints {action}: {done.last_word}") from None
    if done.err:
        print(done.err, file=sys.stderr, end="")
    return report, done.exit_code if done.exit_code is not None else contract.EXIT_FAILED


def list_text(report: Mapping[str, Any], now: float | None = None) -> str:
    """The table of a listing. Pure but for the clock."""
    now = time.time() if now is None else now
    if not report["steps"]:
        return f"no checkpoint in {report['directory']}"
    rows = [["step", "size", "saved", "state", "verified", ""]]
    problems = []
    for step in report["steps"]:
        plain = step["name"] == str(step["step"])
        rows.append(
            [
                str(step["step"]) if plain else step["name"],
                size(step["bytes"]),
                ago(seconds_of(step["saved_at"]), now),
                step["state"],
                _verified(step["verified"], now),
                "a resume takes this one" if step["resume"] else "",
            ]
        )
        if step["problem"] and step["state"] != "unfinished":
            problems.append(f"{step['name']}: {step['problem']}")
    lines = [*table(rows, None, right=(1,)), *(f"  {problem}" for problem in problems)]
    return "\n".join([*lines, f"in {report['directory']}"])


def _verified(entry: Mapping[str, Any] | None, now: float) -> str:
    if entry is None:
        return "not yet"
    return ago(seconds_of(entry["time"]), now) + ("" if entry["ok"] else ": damaged")


def _verify_text(report: Mapping[str, Any]) -> str:
    lines = []
    for step in report["verified"]:
        rate = step["bytes"] / max(step["seconds"], 1e-9)
        if step["ok"]:
            lines.append(
                f"step {step['name']}: every checksum holds ({size(step['bytes'])} in "
                f"{duration(step['seconds'])}, {size(rate)}/s)"
            )
            continue
        kind = "usable, but changed" if step["usable"] else "damaged"
        lines.append(f"step {step['name']}: {kind}: {step['problem']}")
        if step["leaves"] == []:
            lines.append("  no leaf's numbers are changed by it")
        if step["leaves"]:
            shown = ", ".join(step["leaves"][:_NAMED])
            over = len(step["leaves"]) - _NAMED
            more = f" and {over} more" if over > 0 else ""
            lines.append(f"  leaves that it hits: {shown}{more}")
    return "\n".join(lines or ["no step to verify"])


def _delete_text(report: Mapping[str, Any]) -> str:
    return f"deleted: {', '.join(report['deleted'])}"


def _copy_text(report: Mapping[str, Any]) -> str:
    return (
        f"step {report['step']} ({size(report['bytes'])}) copied to {report['copied_to']}, and "
        "verified there"
    )


def _export_text(report: Mapping[str, Any]) -> str:
    return (
        f"{report['tensors']} tensors of step {report['step']} ({size(report['bytes'])}) in "
        f"{report['file']}"
    )


_TEXTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "list": list_text,
    "verify": _verify_text,
    "delete": _delete_text,
    "copy": _copy_text,
    "export": _export_text,
}


def size(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
