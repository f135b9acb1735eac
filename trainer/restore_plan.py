"""Which leaves of a checkpoint become which leaves of the state. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from launch.spec import ConfigError, RestoreSpec
from trainer.opt_state import owner_of
from trainer.param_paths import folded

Leaf = Mapping[str, Any]  # {"shape": [...], "dtype": "..."}

MODEL, OPTIMIZER = "model.", "optimizer."
_LISTED = 12  # Differences that a message lists.


@dataclasses.dataclass(frozen=True)
class RestorePlan:
    """What is taken and what is not.

    Attributes:
      names: names wanted -> names saved.
      fresh: names wanted that start fresh.
      renamed: how many leaves are taken under another name.
    """

    names: dict[str, str]
    fresh: tuple[str, ...]
    renamed: int


def make(
    saved: Mapping[str, Leaf],
    wanted: Mapping[str, Leaf],
    spec: RestoreSpec,
    path: object,
    params: tuple[Collection[str], Collection[str]] | None = None,
) -> RestorePlan:
    """Say for every leaf wanted where it comes from.

    Args:
      saved: dotted name -> what it is in the checkpoint.
      wanted: dotted name -> what it is in this run.
      spec: what the user said of it.
      path: of the checkpoint, for messages.
      params: the names of the params, there and here, if they alone are to be taken.

    Raises:
      ConfigError: something is wanted that is not there, or there and not wanted, or is not the
        same there; with the ways out.
    """
    there = _renamed(saved, spec.rename)
    here: Collection[str] = wanted
    if params is not None:
        theirs = set(params[0])
        there = {new: old for new, old in there.items() if old in theirs}
        here = [name for name in wanted if name in params[1]]
    taken = _choice(spec, [*wanted, *there])
    names, missing, other = {}, [], []
    for name in here:
        if not taken(name):
            continue
        if name not in there:
            missing.append(name)
        elif dict(saved[there[name]]) != dict(wanted[name]):
            other.append(name)
        else:
            names[name] = there[name]
    left = [name for name in there if name not in wanted and taken(name)]
    if missing or other or left:
        differences = [f"{name} is not saved there" for name in missing]
        differences += [f"{there[name]} is not in this run" for name in left]
        differences += [
            f"{name} is {_show(saved[there[name]])} there, {_show(wanted[name])} here"
            for name in other
        ]
        more = len(differences) - _LISTED
        text = "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        mapping = None if other else _guess_rename(missing, left, there, saved, wanted)
        ways = _ways_out([*missing, *left, *other], mapping)
        raise ConfigError(
            "",
            f"the state of this config is not the one saved in {path}: {text}; {ways}restore the "
            "config that wrote it, or give another --workdir",
        )
    fresh = tuple(name for name in wanted if name not in names)
    return RestorePlan(names, fresh, sum(new != old for new, old in names.items()))


def _renamed(saved: Mapping[str, Leaf], rename: Mapping[str, str]) -> dict[str, str]:
    """New name -> name saved, of all leaves; moments move with their params."""
    if not rename:
        return {name: name for name in saved}
    field = "config.restore.rename"
    patterns = [
        (old, re.compile(rf"(?:{old.removeprefix(MODEL)})(?=\.|$)"), new.removeprefix(MODEL))
        for old, new in rename.items()
    ]
    used: set[str] = set()

    def renamed(path: str) -> str:
        for old, pattern, new in patterns:
            match = pattern.match(path)
            if match:
                used.add(old)
                try:
                    return match.expand(new) + path[match.end() :]
                except (re.error, IndexError) as error:
                    raise ConfigError(
                        field, f"cannot take the place of {old!r}: {error}", new
                    ) from None
        return path

    paths = [name.removeprefix(MODEL) for name in saved if name.startswith(MODEL)]
    new_paths = {path: renamed(path) for path in paths}
    found: dict[str, str] = {}
    for name in saved:
        owner = owner_of(name, paths)
        new = name if owner is None else _replaced(name, owner, new_paths[owner])
        if new in found:
            raise ConfigError(field, f"makes {new} of both {found[new]} and {name}")
        found[new] = name
    idle = [old for old in rename if old not in used]
    if idle:
        rule = f"{idle[0]!r} is the beginning of no path that is saved; there are"
        raise ConfigError(field, f"{rule} {_listed(paths)}")
    return found


def _replaced(name: str, path: str, new: str) -> str:
    """The name with its param's path, whole keys of it, in the place of the old one."""
    before, _, after = f".{name}.".rpartition(f".{path}.")
    return f"{before}.{new}.{after}".strip(".")


def _choice(spec: RestoreSpec, names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a leaf is taken from the checkpoint, by its (new) name."""
    for field in ("only", "skip"):
        pattern = getattr(spec, field)
        if pattern and not any(re.search(pattern, name) for name in names):
            rule = f"is found in no path of the state; there are {_listed(names)}"
            raise ConfigError(f"config.restore.{field}", rule, pattern)

    def taken(name: str) -> bool:
        return not (
            (spec.fresh_optimizer and name.startswith(OPTIMIZER))
            or (spec.skip and re.search(spec.skip, name))
            or (spec.only and not re.search(spec.only, name))
        )

    return taken


def _ways_out(names: Sequence[str], mapping: tuple[str, str] | None) -> str:
    """What the user can do about these names, of which a mapping may be the whole reason."""
    if all(name.startswith(OPTIMIZER) for name in names):
        return "give --config.restore.fresh_optimizer=true to start the optimizer anew, "
    if mapping:
        old, new = mapping
        return f"""give --config.restore.rename='{{"{old}": "{new}"}}' if that is what it is, """
    paths = [name.removeprefix(MODEL) for name in names if name.startswith(MODEL)]
    common = _common(paths)
    pattern = re.escape(common) if common else "|".join(map(re.escape, sorted(paths)[:4]))
    return (
        f"give --config.restore.skip='{pattern}' to start these fresh, or --config.restore.rename "
        "for what has another name now (docs/checkpoints.md), "
    )


def _common(paths: Sequence[str]) -> str:
    """The first keys that all paths have in common, `head`."""
    keys = [path.split(".") for path in paths]
    common: list[str] = []
    for column in zip(*keys, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)


def _guess_rename(
    missing: Sequence[str],
    left: Sequence[str],
    there: Mapping[str, str],
    saved: Mapping[str, Leaf],
    wanted: Mapping[str, Leaf],
) -> tuple[str, str] | None:
    """(old path, new path) if that alone explains what is missing and what is left."""
    new = [name.removeprefix(MODEL) for name in missing if name.startswith(MODEL)]
    old = [name.removeprefix(MODEL) for name in left if name.startswith(MODEL)]
    if not new or len(new) != len(old):
        return None
    before, after = _differing(old[0], new[0])
    if not all(path.startswith(before) for path in old):
        return None
    moved = {path: after + path[len(before) :] for path in old}
    alike = all(
        saved[there[MODEL + path]] == wanted.get(MODEL + target) for path, target in moved.items()
    )
    return (re.escape(before), after) if alike and set(moved.values()) == set(new) else None


def _differing(old: str, new: str) -> tuple[str, str]:
    """Both paths without the keys that they have in common at their ends."""
    olds, news = old.split("."), new.split(".")
    while len(olds) > 1 and len(news) > 1 and olds[-1] == news[-1]:
        olds.pop()
        news.pop()
    return ".".join(olds), ".".join(news)


def _listed(paths: Sequence[str], most: int = 4) -> str:
    shown = list(folded(paths))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def _show(leaf: Leaf) -> str:
    return f"{leaf['dtype']}{leaf['shape']}"
