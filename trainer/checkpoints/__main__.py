"""Checkpoints at rest; what `muster checkpoints` runs. Prints one JSON value.

    python -m trainer.checkpoints list DIRECTORY
    python -m trainer.checkpoints verify DIRECTORY [STEP...]
    python -m trainer.checkpoints delete DIRECTORY STEP...
    python -m trainer.checkpoints copy DIRECTORY STEP TARGET
    python -m trainer.checkpoints export DIRECTORY STEP FILE

DIRECTORY is that of the checkpoints, here or on gs://. Imports no jax, so that a list is there at
once. Ends with 1 if a step is damaged, with 2 if what was asked for cannot be.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from launch import contract
from launch.spec import ConfigError
from trainer import storage
from trainer.checkpoints import steps as listing
from trainer.checkpoints.steps import Step
from trainer.exit import run_main
from trainer.storage import Path

_COUNTS = {
    "list": (0, 0),
    "verify": (0, 9999),
    "delete": (1, 9999),
    "copy": (2, 2),
    "export": (2, 2),
}


def main(argv: list[str]) -> int:
    """Carry out a command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=_COUNTS)
    parser.add_argument("directory")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--ema", action="store_true", help="of export: the averages of the params")
    parser.add_argument("--live", choices=["running", "starting"], help="a run is using them")
    args = parser.parse_args(argv)
    least, most = _COUNTS[args.action]
    if not least <= len(args.arguments) <= most:
        parser.error(f"{args.action} takes {least} to {most} arguments")
    remote = storage.is_remote(args.directory)
    directory = storage.path(storage.run_directory(args.directory) if remote else args.directory)
    try:
        steps = listing.list_steps(directory)
    except FileNotFoundError:
        steps = []
    except Exception as error:
        if storage.is_remote(directory) and storage.is_refusal(error):
            raise ConfigError("", f"{directory} cannot be read: {storage.reason(error)}") from None
        raise
    report, code = _act(args, directory, steps)
    print(
        json.dumps({"schema": contract.SCHEMA, "directory": str(directory), **report}), flush=True
    )
    return code


def _act(args: Any, directory: Path, steps: list[Step]) -> tuple[dict[str, Any], int]:
    """Carry out one action; its report and the exit code."""
    words = args.arguments
    if args.action == "list":
        return {"steps": [step.as_json() for step in steps]}, contract.EXIT_DONE
    if args.action == "verify":
        from trainer.checkpoints.verify import verify

        chosen = _chosen(steps, words or ["all"])
        found = [verify(directory, step) for step in chosen]
        bad = any(not report["ok"] for report in found)
        return {"verified": found}, contract.EXIT_FAILED if bad else contract.EXIT_DONE
    if args.action == "delete":
        from trainer.checkpoints.delete import delete

        deleted = delete(directory, steps, _chosen(steps, words), live=args.live)
        return {"deleted": deleted}, contract.EXIT_DONE
    step = _good(steps, words[0])
    if args.action == "copy":
        from trainer.checkpoints.copying import copy

        return copy(directory, step, words[1]), contract.EXIT_DONE
    from trainer.checkpoints.export import export

    return export(directory, step, words[1], ema=args.ema), contract.EXIT_DONE


def _chosen(steps: list[Step], words: list[str]) -> list[Step]:
    """The steps that the user's words mean."""
    found: dict[str, Step] = {}
    for word in words:
        try:
            found |= {step.name: step for step in listing.find_steps(steps, word)}
        except LookupError as error:
            raise ConfigError("", str(error.args[0])) from None
    return list(found.values())


def _good(steps: list[Step], word: str) -> Step:
    """The one step that a word means; it must be complete."""
    (step, *_) = _chosen(steps, [word])
    if not step.good:
        raise ConfigError("", f"step {step.name} is {step.state}: {step.problem}")
    return step


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
