"""Parameters chosen by regular expressions over their paths: masks and groups for Optax."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from launch.spec import ConfigError, closest
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
        self._check_none_lost(paths)
        taken = {self.group_of(path) for path in paths}
        for pattern, group in self._pairs:
            if group in taken:
                continue
            check_matches(f"{self._field} (group {group!r})", [pattern], paths)
            others = sorted({str(self.group_of(path)) for path in paths if pattern.search(path)})
            rule = f"group {group!r} gets nothing: all that {pattern.pattern!r} matches is taken by"
            raise ConfigError(
                self._field, f"{rule} {', '.join(others)} before it; the first that matches wins"
            )

    def _check_none_lost(self, paths: Sequence[str]) -> None:
        lost = [path for path in paths if self.group_of(path) is None]
        if lost:
            rule = f"no group takes {_listed(lost)}; add a pair for them, r'.*' last takes all"
            raise ConfigError(self._field, rule)

    def __call__(self, params: Any) -> Any:
        """Params -> tree of groups' names.

        Raises:
          ConfigError: a parameter has none. Optax asks before `check` can be called.
        """
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [param_path(path) for path, _ in leaves]
        self._check_none_lost(paths)
        return treedef.unflatten([self.group_of(path) for path in paths])


def check_matches(field: str, patterns: Iterable[re.Pattern[str]], paths: Iterable[str]) -> None:
    """Refuse an expression that matches no parameter: it is a typing mistake.

    Raises:
      ConfigError: with the closest name in a path, or some paths there are.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(pattern.search(path) for path in paths):
            keys = {key for path in paths for key in path.split(".") if not key.isdigit()}
            guesses = [closest(word, keys) for word in re.findall(r"[A-Za-z]\w+", pattern.pattern)]
            guess = next((guess for guess in guesses if guess.startswith("did you mean")), "")
            there = guess or f"there are {_listed(paths)}"
            raise ConfigError(field, f"{pattern.pattern!r} matches no parameter; {there}")


def check_some(field: str, patterns: Sequence[re.Pattern[str]], paths: Iterable[str]) -> str | None:
    """Refuse expressions none of which matches a parameter; remark on those that do not.

    Raises:
      ConfigError: with the closest name in a path, or some paths there are.
    """
    paths = list(paths)
    idle = [p.pattern for p in patterns if not any(p.search(path) for path in paths)]
    if len(idle) == len(patterns):
        check_matches(field, patterns, paths)
    return f"note: {field}: {', '.join(map(repr, idle))} matches no parameter" if idle else None


def folded(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths that differ in their numbers alone as one: `layers.0-3.mlp.up` and its four paths.

    Only where the numbers make up whole ranges; other paths stay as they are.
    """
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for path in paths:
        keys = path.split(".")
        alike.setdefault(tuple("" if key.isdigit() else key for key in keys), []).append(keys)
    found: dict[str, list[str]] = {}
    for members in alike.values():
        names = [".".join(keys) for keys in members]
        columns = [sorted(set(column), key=_number) for column in zip(*members, strict=True)]
        whole = math.prod(map(len, columns)) == len(members) and all(
            _number(column[-1]) - _number(column[0]) == len(column) - 1 for column in columns
        )
        if whole:
            found[".".join("-".join(dict.fromkeys((c[0], c[-1]))) for c in columns)] = names
        else:
            found |= {name: [name] for name in names}
    return found


def _number(key: str) -> int:
    return int(key) if key.isdigit() else 0


def _listed(paths: Sequence[str], most: int = 4) -> str:
    shown = list(folded(paths))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
