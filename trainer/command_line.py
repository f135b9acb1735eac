"""The trainer's flags, parsed by absl; a mistake is one line."""

from __future__ import annotations

from absl import flags

from launch.spec import ConfigError, closest


def parse_flags(argv: list[str], known: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse absl's flags; a mistake is one line with the closest match.

    Args:
      argv: the program's name and its arguments.
      known: the flags there are.

    Raises:
      ConfigError: an unknown flag, a wrong value, or an argument that is no flag.
    """
    try:
        rest = known(argv)
    except flags.UnrecognizedFlagError as error:
        names = [name for name in known if len(name) > 1]
        raise ConfigError(
            "", f"unknown flag --{error.flagname}; {closest(error.flagname, names)}"
        ) from None
    except flags.Error as error:
        raise ConfigError("", " ".join(str(error).split())) from None
    if rest[1:]:
        raise ConfigError("", f"unexpected argument {rest[1]!r}; flags are written --name=value")
    return rest
