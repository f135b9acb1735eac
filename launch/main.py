"""The command line of Muster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from launch import contract
from launch.errors import ConfigError, closest

HELP = """\
Muster starts one program on many processes, keeps them together and says what became of them.

  muster run --config=FILE --cluster=FILE --workdir=DIR [--config.x.y=V] [--cluster.x=V]
      train what the config says (python -m trainer.main)
  muster run --cluster=FILE --workdir=DIR -- PROGRAM ARGUMENTS...
      run any program; jax.distributed.initialize() without arguments joins the gang
  muster plan --config=FILE --cluster=FILE [--config.x.y=V] [--cluster.x=V] [--json]
      compile the very training step for that cluster, which need not be there: memory, traffic
      and the least time of a step
  muster plan --search --config=FILE --cluster=FILE [--accelerators=TYPE,...] [--json]
      the same over meshes, remat, microbatches and sharding; a table of what fits and is quickest
  muster certify --config=FILE --cluster=FILE --workdir=DIR [--config.x.y=V] [--json]
      prove that a run that is killed and resumed is the same run, on that very cluster

  muster list [--json] [--prune]
      every run you have started, and how it stands
  muster status RUN [--json]
      attempts, causes, who is to blame, steps, and what every process does now
  muster logs RUN [--follow] [--process=K|all] [--attempt=K]
      processes' output, process 0's of the newest attempt by default
  muster checkpoints RUN [--json]
      steps with size, age and condition, and which of them a resume would take
  muster checkpoints RUN verify [STEP|all ...] | delete STEP... | copy STEP DIR |
                         export STEP FILE.safetensors [--ema]
      compare every byte with its checksum; delete, but never the only good one; copy to where
      another run can resume or start; params (or their averages) for other programs
  muster stop RUN
      have a run saved and stopped, from wherever its directory is seen; again to kill it at once

  muster gc [--dry_run]
      delete the machines of a cloud that no run needs any more
  muster doctor --cluster=FILE [--workdir=DIR] [--wait=SECONDS]
      can this cluster run a gang? tries it, and says what is missing

RUN is a run directory, or the name or id of a run that `muster list` shows.

flags of run:
  --config=FILE[:VARIANT]   what to train, a file with get_config()
  --cluster=FILE[:VARIANT]  where, e.g. configs/cluster/local.py
  --workdir=DIR             the run directory; a run that is there already is resumed
  --detach                  give the terminal back once the gang has started
  --process=all|K           show every process's lines, or process K's instead of the lead's
  --dry_run                 print the commands and their environment, start nothing
  --skip_plan               on TPUs: do not look first whether the training step fits
  --config.init_from=RUN[@STEP]             a new run begins with the params of another one
  --config.restore.allow_change=NAME,...    fields, groups, `code` or `versions` that may differ
                                            from what the run was saved with
  --config.restore.{skip,only,fresh_optimizer,rename}=...   for a state that does not fit as it is

flags of plan --search:
  --accelerators=TYPE,...   accelerator types to compare; the cluster's own by default
  --device_batches=N,...    examples per device and step; by default the config's global batch stays
  --compile=N               how many of the best are compiled (6); the others are estimated
  --parallel=N              how many at once; half the cores by default

flags of certify:
  --steps=N                 how long its runs are (12)
  --interruptions=NAME,...  PHASE:KIND of restore, compile, step, save, eval and kill, kill_one,
                            exception, sigterm, twice; or none
  --topologies=NAME,...     fewer, more, mesh; or none
  --parallel=N              how many runs at once
  --seed=N                  of where and whom the interruptions hit (0)
  --keep                    keep the runs' checkpoints, which are deleted when all is well

exit codes: 0 done, 1 the program failed, 2 the command or config is wrong,
            75 stopped early, to be resumed by the same command
"""

# Flags by command; True for one that takes no value. `--config`, `--cluster` are load_config's.
_FLAGS: dict[str, dict[str, bool]] = {
    "run": {"workdir": False, "process": False, "detach": True, "dry_run": True, "skip_plan": True},
    "plan": {
        "json": True,
        "search": True,
        "accelerators": False,
        "device_batches": False,
        "compile": False,
        "parallel": False,
    },
    "certify": {
        "workdir": False,
        "json": True,
        "steps": False,
        "interruptions": False,
        "topologies": False,
        "parallel": False,
        "seed": False,
        "keep": True,
    },
    "list": {"json": True, "prune": True},
    "status": {"json": True},
    "logs": {"process": False, "attempt": False, "follow": True},
    "checkpoints": {"json": True, "ema": True},
    "stop": {},
    "gc": {"dry_run": True},
    "doctor": {"workdir": False, "wait": False},
}
_CONFIG_FLAGS = ("config", "cluster")
_WITH_CONFIGS = ("run", "plan", "certify", "doctor")


def console() -> None:
    """Entry point of the `muster` script."""
    # A config file can import what it could under `python -m trainer.main`.
    sys.path.insert(0, os.getcwd())
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Carry out one command line; returns the exit code."""
    try:
        return _dispatch(list(argv))
    except ConfigError as error:
        print(f"muster: error: {error}", file=sys.stderr)
        return contract.EXIT_CONFIG
    except KeyboardInterrupt:
        return contract.EXIT_RESUMABLE  # Nothing was started yet, or `logs --follow` was enough.


def _dispatch(argv: list[str]) -> int:
    if not argv:
        print(HELP, file=sys.stderr, end="")
        return contract.EXIT_CONFIG
    before_program = argv[: argv.index("--")] if "--" in argv else argv
    if argv[0] == "help" or any(arg in ("--help", "-h", "-help") for arg in before_program):
        print(HELP, end="")
        return contract.EXIT_DONE
    command, rest = argv[0], argv[1:]
    if command not in _FLAGS:
        raise ConfigError("", f"no command {command!r}; {closest(command, _FLAGS)}")
    flags, arguments = split_flags(command, rest)
    if command == "run":
        from launch import run
        from launch.request import make_request

        request = make_request(arguments, flags, ["muster", *argv])
        if "dry_run" in flags:
            run.dry_run(request)
            return contract.EXIT_DONE
        return run.run(request, detached="detach" in flags)
    if command == "plan":
        from launch.plan.command import plan

        return plan(arguments, flags)
    if command == "certify":
        from launch.certify.command import certify

        return certify(arguments, flags, ["muster", *argv])
    if command == "doctor":
        from launch.doctor import doctor

        return doctor(arguments, flags)
    if command == "gc":
        from launch.gc import gc

        _no_arguments(command, arguments)
        return gc(flags)
    if command == "list":
        _no_arguments(command, arguments)
        from launch.listing import list_runs

        return list_runs(flags)
    if command == "checkpoints":
        from launch.checkpoints import checkpoints

        return checkpoints(arguments, flags)
    if len(arguments) != 1:
        raise ConfigError("", f"muster {command} takes one RUN, see `muster list`; got {arguments}")
    return _look_at(command)(arguments[0], flags)


def _no_arguments(command: str, arguments: Sequence[str]) -> None:
    if arguments:
        raise ConfigError("", f"muster {command} takes no argument; got {list(arguments)}")


def _look_at(command: str) -> Callable[[str, Mapping[str, str]], int]:
    """The function of a command on one run; what the others import is not waited for."""
    if command == "status":
        from launch.status import status

        return status
    if command == "logs":
        from launch.logs import logs

        return logs
    from launch.stopping import ask_to_stop

    return ask_to_stop


def split_flags(command: str, argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split a command's own flags, `--name=V` or `--name V`, from its other arguments.

    Raises:
      ConfigError: a flag that is neither the command's nor about a config.
    """
    known = _FLAGS[command]
    flags: dict[str, str] = {}
    rest: list[str] = []
    arguments = list(argv)
    while arguments:
        arg = arguments.pop(0)
        if arg == "--":
            return flags, [*rest, arg, *arguments]
        if not arg.startswith("-"):
            rest.append(arg)
            continue
        name, equals, value = arg.lstrip("-").partition("=")
        name = name if _is_config_flag(command, name) else name.replace("-", "_")
        if _is_config_flag(command, name):
            rest.append(arg)
            # A value of its own word must not be taken for a flag or an argument of ours.
            if not equals and arguments and not arguments[0].startswith("-"):
                rest.append(arguments.pop(0))
        elif name not in known:
            names = [*known, *(_CONFIG_FLAGS if command in _WITH_CONFIGS else ())]
            raise ConfigError("", f"muster {command} has no flag {arg!r}; {closest(name, names)}")
        elif known[name]:
            if equals:
                raise ConfigError(f"--{name}", "takes no value", value)
            flags[name] = "true"
        else:
            if not equals and not arguments:
                raise ConfigError("", f"--{name} needs a value")
            flags[name] = value if equals else arguments.pop(0)
    return flags, rest


def _is_config_flag(command: str, name: str) -> bool:
    if command not in _WITH_CONFIGS:
        return False
    stem = name.partition(".")[0]
    return stem in _CONFIG_FLAGS or ("." in name and stem.removeprefix("no") in _CONFIG_FLAGS)
