"""What every process of a gang runs: Muster's own trainer, or anybody's program."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.spec import ConfigError

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_INSTALLED = ("site-packages", "dist-packages")


@dataclasses.dataclass(frozen=True)
class Program:
    """A command line and what it adds to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


def trainer_program(
    source: str, overrides: Sequence[str], workdir: Path, cluster_env: Mapping[str, str]
) -> Program:
    """The built-in trainer on a config.

    Args:
      source: the config file, absolute, with its variant.
      overrides: in the form `--config.a.b=V`.
      workdir: the run directory, absolute.
      cluster_env: environment that the cluster config sets.

    Raises:
      ConfigError: the processes would import something else than Muster's trainer.
    """
    argv = (sys.executable, "-m", "trainer.main", f"--config={source}", *overrides)
    return Program((*argv, f"--workdir={workdir}"), trainer_env(cluster_env))


def trainer_env(cluster_env: Mapping[str, str]) -> dict[str, str]:
    """What `python -m trainer.main` needs in its environment, to be found.

    Args:
      cluster_env: environment that the cluster config sets.

    Raises:
      ConfigError: the process would import something else than Muster's trainer.
    """
    package = Path(__file__).resolve().parents[1] / "trainer"
    # `python -m` looks in the current directory first.
    for name in ("trainer", "trainer.py"):
        other = Path.cwd() / name
        if other.exists() and other.resolve() != package:
            rule = f"{other} hides Muster's own package `trainer`; start from another directory"
            raise ConfigError("", rule)
    env: dict[str, str] = {}
    if package.parent.name not in _INSTALLED:  # A checkout: Python does not find it by itself.
        before = cluster_env.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package.parent), before]))
    return env


def is_secret(name: str) -> bool:
    """Whether the value of a variable of this name is not to be shown."""
    return bool(_SECRET.search(name))


def without_secrets(env: Mapping[str, str]) -> dict[str, str]:
    """The environment as it may be shown: values whose names sound secret are masked."""
    return {name: "***" if is_secret(name) else value for name, value in env.items()}


def shown_command(command: Sequence[str]) -> list[str]:
    """A `muster run` command line as it may be shown, with the same values masked."""
    shown: list[str] = []
    masked = False  # Whether this word is the value of the one before.
    for word in command:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--cluster.env.") and is_secret(name)
        shown.append("***" if masked else f"{name}=***" if secret and equals else word)
        masked = secret and not equals
    return shown
