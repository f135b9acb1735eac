"""Sections of a config's `optimizer` as chains of Optax transformations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax

from launch.spec import ConfigError, closest
from trainer import optax_adapters, param_paths
from trainer.import_path import import_path
from trainer.optax_names import (
    bound,
    call,
    check_names,
    check_values,
    find_transformation,
    function_of,
    is_import_path,
)
from trainer.param_paths import Choice, Groups
from trainer.schedules import Schedule, make_schedule

_DECAYS = ("weight_decay", "weight_decay_rate", "adam_weight_decay")
_GROUPED = ("partition", "multi_transform")


@dataclasses.dataclass
class Facts:
    """What the parts of a chain do to a parameter, by its path.

    Attributes:
      decays: choices of the parameters whose weights decay, one per transformation that does it.
      groups: (which parameters get here, their groups), outermost first.
      frozen: choices of the parameters that are not trained.
      checks: to be called with the paths of all parameters; each may return a remark.
      ndims: number of dims of every parameter, once `check` has been told.
    """

    decays: list[Choice] = dataclasses.field(default_factory=list)
    groups: list[tuple[Choice, Groups]] = dataclasses.field(default_factory=list)
    frozen: list[Choice] = dataclasses.field(default_factory=list)
    checks: list[Callable[[list[str]], str | None]] = dataclasses.field(default_factory=list)
    ndims: dict[str, int] = dataclasses.field(default_factory=dict)

    def check(self, ndims: Mapping[str, int]) -> list[str]:
        """Refuse expressions and groups that do not fit a model's parameters.

        Args:
          ndims: number of dims of every parameter, by path.

        Returns:
          Remarks about what fits and looks like a mistake.

        Raises:
          ConfigError: it lists paths.
        """
        self.ndims.update(ndims)
        remarks = [check(list(ndims)) for check in self.checks]
        return [remark for remark in remarks if remark]

    def decayed(self, path: str) -> bool:
        """Whether some transformation decays this parameter's weights."""
        return any(choice(path) for choice in self.decays) and not self.is_frozen(path)

    def is_frozen(self, path: str) -> bool:
        """Whether every update of this parameter is set to zero."""
        return any(choice(path) for choice in self.frozen)

    def group(self, path: str) -> str:
        """The names of the parameter's groups, outermost first; empty when it has none."""
        return "/".join(str(groups.group_of(path)) for here, groups in self.groups if here(path))


@dataclasses.dataclass
class ChainBuilder:
    """Builds transformations from sections, and notes what they do."""

    facts: Facts
    spared: Choice | None = None  # By `no_decay`.
    group: str = ""  # Of the chain that is being built.
    learning_rates: dict[str, Schedule] = dataclasses.field(default_factory=dict)
    schedules: list[tuple[str, Schedule]] = dataclasses.field(default_factory=list)

    def chain(
        self, field: str, section: Any, scope: Choice, also: tuple[str, ...] = ()
    ) -> optax.GradientTransformation:
        """A section with a `chain`. `scope` chooses the parameters that get here."""
        if not isinstance(section, Mapping):
            raise ConfigError(field, "must be a section with a `chain`", section)
        names = section.get("chain", ())
        check_names(f"{field}.chain", names, "must be a tuple of Optax names, e.g. ('adamw',)")
        for name in names:
            find_transformation(f"{field}.chain", function_of(name))
        for name, value in section.items():
            # A command line cannot take a section of the file out, but it can set it to None.
            if name not in ("chain", *names, *also) and value is not None:
                guess = closest(name, [*names, *also])
                guess = guess if guess.startswith("did you mean") else "put it there,"
                rule = f"not in the chain {names}; {guess} or take it out: {field}.{name}=None"
                raise ConfigError(f"{field}.{name}", rule)
        if names == ("set_to_zero",):
            self.facts.frozen.append(scope)
        return optax.chain(
            *[
                self.transformation(
                    f"{field}.{name}", f"{field}.chain", name, section.get(name, {}), scope
                )
                for name in names
            ]
        )

    def transformation(
        self, field: str, named_in: str, entry: str, section: Any, scope: Choice
    ) -> optax.GradientTransformation:
        """One name of a chain with its section."""
        name = function_of(entry)
        function = find_transformation(named_in, name)
        if not isinstance(section, Mapping):
            raise ConfigError(field, f"must be a section with the arguments of {name}", section)
        if name.startswith("inject_") and "inner_factory" in section:
            made = self.injected(field, function, section, scope)
        else:
            arguments = self.arguments(field, function, section, scope)
            if name == "selective_transform" and callable(arguments["freeze_mask"]):
                function = optax_adapters.selective  # Optax's own would freeze everything.
            made = call(field, function, arguments)
        if isinstance(made, optax.MultiSteps):
            made = made.gradient_transformation()
        if not isinstance(made, optax.GradientTransformation):
            raise ConfigError(named_in, f"optax.{name} does not make a gradient transformation")
        return optax_adapters.blaming(field, optax_adapters.adapted(name, made))

    def injected(
        self, field: str, function: Callable[..., Any], section: Mapping[str, Any], scope: Choice
    ) -> Any:
        """`inject_hyperparams`: its `inner_factory` is a name with the arguments of that one."""
        field = f"{field}.inner_factory"
        inner = section["inner_factory"]
        if not isinstance(inner, Mapping) or len(inner) != 1:
            rule = "must be a section with one entry, a transformation's name with its arguments"
            raise ConfigError(field, rule, inner)
        ((name, arguments),) = inner.items()
        factory = find_transformation(field, name)
        arguments = self.arguments(f"{field}.{name}", factory, arguments, scope, scheduled=True)
        # Optax would take a mask's function for a schedule.
        static = {*section.get("static_args", ())} | {k for k in arguments if k.endswith("mask")}
        outer = {**section, "inner_factory": factory, "static_args": tuple(sorted(static))}
        made = call(field, function, outer)
        bound(f"{field}.{name}", factory, arguments)
        return call(f"{field}.{name}", made, arguments)

    def arguments(
        self,
        field: str,
        function: Callable[..., Any],
        section: Mapping[str, Any],
        scope: Choice,
        scheduled: bool = False,
    ) -> dict[str, Any]:
        """A section's values as Optax wants them, and notes of what they mean.

        `scheduled` says that every number may be a schedule.
        """
        values = bound(field, function, section)
        check_values(field, function, section, scheduled)
        name = function.__name__
        masks = {
            key: param_paths.any_of(self.patterns(f"{field}.{key}", values[key]))
            for key in section
            if key.endswith("mask") and not isinstance(values[key], (bool, type(None)))
        }
        made: dict[str, Any] = {}
        inner = scope
        if name == "masked" and "mask" in masks:
            inner = _both(scope, masks["mask"])
        elif name == "selective_transform" and "freeze_mask" in masks:
            inner = _both(scope, lambda path: not masks["freeze_mask"](path))
        if name in ("freeze", "selective_transform"):
            frozen = masks.get("mask", masks.get("freeze_mask"))
            self.facts.frozen.append(_both(scope, frozen) if frozen else lambda path: False)
        for key, value in section.items():
            if key in masks:
                made[key] = param_paths.as_mask(masks[key])
            elif name in _GROUPED and key == "transforms":
                made |= self.groups(field, section, scope)
            elif name in _GROUPED and key == "param_labels":
                pass  # With `transforms`.
            else:
                made[key] = self.value(f"{field}.{key}", value, inner)
        if self.group not in self.learning_rates and values.get("learning_rate") is not None:
            rate = made.get("learning_rate", values["learning_rate"])
            self.learning_rates[self.group] = rate if callable(rate) else lambda step: rate
        if name == "muon":
            self.decay_by_muon(field, values, masks, made, scope)
        else:
            self.decay(field, values, masks, made, scope)
        return made

    def value(self, field: str, value: Any, scope: Choice) -> Any:
        """One argument: a transformation, a schedule, a function, or the value itself."""
        if isinstance(value, Mapping):
            if "chain" in value:
                return self.chain(field, value, scope)
            if value and all(str(key).isdigit() for key in value):
                return {int(key): item for key, item in value.items()}
            schedule = make_schedule(field, value)
            self.schedules.append((field, schedule))
            return schedule
        if is_import_path(value):
            return import_path(field, value, callable, "function")
        return value

    def groups(self, field: str, section: Mapping[str, Any], scope: Choice) -> dict[str, Any]:
        """`transforms` and `param_labels` of `optax.partition`."""
        sections = section["transforms"]
        if not isinstance(sections, Mapping):
            rule = "must have a section with a `chain` for every group"
            raise ConfigError(f"{field}.transforms", rule, sections)
        groups = Groups(f"{field}.param_labels", section.get("param_labels", ()), sections)
        self.facts.groups.append((scope, groups))
        self.facts.checks.append(lambda paths: groups.check(filter(scope, paths)))

        def choice(name: str) -> Choice:
            return _both(scope, lambda path: groups.group_of(path) == name)

        made, outer = {}, self.group
        for name in groups.names:
            self.group = f"{outer}/{name}" if outer else name
            where = f"{field}.transforms.{name}"
            made[name] = self.chain(where, sections[name], choice(name))
        self.group = outer
        return {"transforms": made, "param_labels": groups}

    def patterns(self, field: str, value: Any) -> Any:
        """Regular expressions; each must match some parameter."""
        patterns = param_paths.compile_patterns(field, value)
        self.facts.checks.append(lambda paths: param_paths.check_matches(field, patterns, paths))
        return patterns

    def decay(
        self,
        field: str,
        values: Mapping[str, Any],
        masks: Mapping[str, Choice],
        made: dict[str, Any],
        scope: Choice,
    ) -> None:
        """Note whose weights decay; leave out those that `no_decay` spares."""
        weights = [key for key in _DECAYS if key in values and not _is_zero(values[key])]
        if not weights:
            return
        mask = next((key for key in ("weight_decay_mask", "mask") if key in values), None)
        choice = _both(scope, masks[mask]) if mask and mask in masks else scope
        if self.spared is not None:
            if mask is None:
                rule = "decays and takes no mask, so no_decay cannot be kept; set it to 0, or put"
                raise ConfigError(f"{field}.{weights[0]}", f"{rule} the parameters into groups")
            spared = self.spared
            choice = _both(choice, lambda path: not spared(path))
            made[mask] = param_paths.as_mask(choice)
        self.facts.decays.append(choice)

    def decay_by_muon(
        self,
        field: str,
        values: Mapping[str, Any],
        masks: Mapping[str, Choice],
        made: dict[str, Any],
        scope: Choice,
    ) -> None:
        """`decay` for Muon, which leaves what is no matrix to an Adam with a decay of its own."""
        ndims = self.facts.ndims
        # Whoever says by a function what is a matrix is taken to mean all of them.
        every = values["muon_weight_dimension_numbers"] is not None
        matrices = _both(scope, lambda path: every or ndims.get(path) == 2)
        others = _both(scope, lambda path: every or ndims.get(path) != 2)
        own = {key: value for key, value in values.items() if key != "adam_weight_decay"}
        self.decay(field, own, masks, made, matrices)
        self.decay(field, {"adam_weight_decay": values["adam_weight_decay"]}, {}, made, others)


def _both(first: Choice, second: Choice) -> Choice:
    return lambda path: first(path) and second(path)


def _is_zero(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and value == 0)
