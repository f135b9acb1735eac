"""Parameters chosen by regular expressions over their paths: masks and groups for Optax."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from launch.spec import ConfigError
from trainer.sharding import dotted

Choice = Callable[[str], bool]  # Whether a parameter of this path is chosen.


def param_path(path: Sequence[Any]) -> str:
    """A leaf's key path in a tree of params as `layers.0.mlp.kernel`."""
    return dotted(path).removesuffix(".value")  # What an nnx.Variable calls its array.


def compile_patterns(field: str, patterns: Any) -> tuple[re.Pattern[str], ...]:
    """One regular expression or a tuple of them, compiled.

    Raises:
      ConfigError: not that, or not an expression.
    """
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
        rule = "must be a regular expression over parameter paths, or a tuple of them"
        raise ConfigError(field, rule, patterns)
    try:
        return tuple(re.compile(pattern) for pattern in patterns)
    except re.error as error:
        raise ConfigError(field, f"not a regular expression: {error}", patterns) from None


def any_of(patterns: Iterable[re.Pattern[str]]) -> Choice:
    """Choose the paths in which any of the expressions is found."""
    patterns = tuple(patterns)
    return lambda path: any(pattern.search(path) for pattern in patterns)


def as_mask(choice: Choice) -> Callable[[Any], Any]:
    """The choice as Optax wants masks: params -> tree of bools."""

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: choice(param_path(path)), params)

    return mask


class Groups:
    """Names of groups by regular expressions, the first that matches; a `param_labels` for Optax.

    Args:
      field: of the config, for messages.
      labels: pairs (regular expression, name of a group).
      names: of all groups that have a transformation.

    Raises:
      ConfigError: not pairs, no expression, or a name without a transformation or the reverse.
    """

    def __init__(self, field: str, labels: Any, names: Iterable[str]):
        self._field = field
        names = sorted(names)
        pairs = isinstance(labels, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
            for pair in labels
        )
        if not pairs or not labels:
            rule = "must be pairs (regular expression, group), e.g. ((r'bias$', 'biases'),)"
            raise ConfigError(field, rule, labels)
        self._pairs = [
            (compile_patterns(f"{field}[{index}]", pattern)[0], group)
            for index, (pattern, group) in enumerate(labels)
        ]
        for _, group in labels:
            if group not in names:
                rule = f"group {group!r} has no entry in transforms, which has {', '.join(names)}"
                raise ConfigError(field, rule)
        for name in names:
            if name not in [group for _, group in labels]:
                raise ConfigError(field, f"no expression leads to group {name!r} of transforms")

    @property
    def names(self) -> list[str]:
        """All groups, in the order in which their expressions are tried."""
        return list(dict.fromkeys(group for _, group in self._pairs))

    def group_of(self, path: str) -> str | None:
        """The group of a parameter; None when no expression matches."""
        return next((group for pattern, group in self._pairs if pattern.search(path)), None)

    def check(self, paths: Iterable[str]) -> None:
        """Every parameter must have a group, and every group a parameter.

        Raises:
          ConfigError: lists paths.
        """
        paths = list(paths)
        lost = [path for path in paths if self.group_of(path) is None]
        if lost:
            rule = f"no group takes {_listed(lost)}; add an expression, the last one r'.*' for all"
            raise ConfigError(self._field, rule)
        taken = {self.group_of(path) for path in paths}
        for pattern, group in self._pairs:
            if group not in taken:
                rule = f"group {group!r} ({pattern.pattern!r}) takes none of {_listed(paths)}"
                raise ConfigError(self._field, rule + "; the first expression that matches wins")

    def __call__(self, params: Any) -> Any:
        """Params -> tree of groups' names."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: self.group_of(param_path(path)) or "", params
        )


def check_matches(field: str, patterns: Iterable[re.Pattern[str]], paths: Iterable[str]) -> None:
    """Refuse an expression that matches no parameter: it is a typing mistake.

    Raises:
      ConfigError: with some paths there are.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(pattern.search(path) for path in paths):
            raise ConfigError(field, f"{pattern.pattern!r} matches none of {_listed(paths)}")


def _listed(paths: Sequence[str], most: int = 6) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more
