"""A config's `optimizer` section as an Optax transformation, by Optax's own names.

docs/optimizer.md says how a section is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from launch.spec import ConfigError, build, closest
from trainer import param_paths, transforms
from trainer.optax_names import (
    bound,
    call,
    find_transformation,
    function_of,
    import_function,
    is_import_path,
)
from trainer.param_paths import Choice, Groups
from trainer.schedules import Schedule, is_schedule_section, make_schedule

FIELD = "config.optimizer"

# Fields of the whole section; every other one belongs to the chain.
_AROUND = ("ema_decay", "master_dtype", "no_decay", "skip")
_DECAYS = ("weight_decay", "weight_decay_rate", "adam_weight_decay")
_GROUPED = ("partition", "multi_transform")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An Optax transformation and what is worth knowing of it.

    Attributes:
      tx: the transformation.
      learning_rate: step -> learning rate of the first transformation that takes one; None when
        none does.
      schedules: every schedule with its field.
      skip: which updates are left out; None for none.
      facts: about parameters.
    """

    tx: optax.GradientTransformation
    learning_rate: Schedule | None
    schedules: list[tuple[str, Schedule]]
    skip: transforms.SkipSpec | None
    facts: Facts


@dataclasses.dataclass
class Facts:
    """What the parts of a chain do to a parameter, by its path.

    Attributes:
      decays: choices of the parameters whose weights decay, one per transformation that does it.
      groups: (which parameters get here, their groups), outermost first.
      frozen: choices of the parameters that are not trained.
      checks: to be called with the paths of all parameters.
    """

    decays: list[Choice] = dataclasses.field(default_factory=list)
    groups: list[tuple[Choice, Groups]] = dataclasses.field(default_factory=list)
    frozen: list[Choice] = dataclasses.field(default_factory=list)
    checks: list[Callable[[list[str]], None]] = dataclasses.field(default_factory=list)

    def check(self, paths: Iterable[str]) -> None:
        """Refuse expressions and groups that do not fit a model's parameters.

        Raises:
          ConfigError: it lists paths.
        """
        paths = list(paths)
        for check in self.checks:
            check(paths)

    def decayed(self, path: str) -> bool:
        """Whether some transformation decays this parameter's weights."""
        return any(choice(path) for choice in self.decays) and not self.is_frozen(path)

    def is_frozen(self, path: str) -> bool:
        """Whether every update of this parameter is set to zero."""
        return any(choice(path) for choice in self.frozen)

    def group(self, path: str) -> str:
        """The names of the parameter's groups, outermost first; empty when it has none."""
        return "/".join(str(groups.group_of(path)) for here, groups in self.groups if here(path))


def make_optimizer(config: Mapping[str, Any]) -> Optimizer:
    """Build the transformation that a section describes. Makes no array.

    Args:
      config: the section, plain: dicts and tuples.

    Raises:
      ConfigError: an unknown name or argument (with the closest match), a missing argument, a
        section that the chain does not use, or what Optax itself refuses.
    """
    builder = _Builder(Facts())
    if "no_decay" in config:
        field = f"{FIELD}.no_decay"
        patterns = param_paths.compile_patterns(field, config["no_decay"])
        builder.spared = param_paths.any_of(patterns)
        builder.facts.checks.append(lambda paths: param_paths.check_matches(field, patterns, paths))
    tx = builder.chain(FIELD, config, lambda path: True, also=_AROUND)
    if (dtype := config.get("master_dtype")) is not None:
        tx = transforms.master_weights(tx, _dtype(f"{FIELD}.master_dtype", dtype))
    if (decay := config.get("ema_decay")) is not None:
        if not isinstance(decay, float) or not 0 < decay < 1:
            raise ConfigError(f"{FIELD}.ema_decay", "must be a number between 0 and 1", decay)
        tx = transforms.average_params(tx, decay)
    skip = None
    if config.get("skip") is not None:
        skip = build(transforms.SkipSpec, config["skip"], f"{FIELD}.skip")
        tx = transforms.skip_bad_steps(tx, skip)
    return Optimizer(tx, builder.learning_rate, builder.schedules, skip, builder.facts)


def check_update(tx: optax.GradientTransformation, params: Any) -> None:
    """Trace an update on abstract params, to find what Optax refuses only then.

    Args:
      tx: the transformation.
      params: pure, of ShapeDtypeStructs.

    Raises:
      ConfigError: the update fails, or changes the shape or dtype of its state.
    """

    def update(params: Any) -> tuple[Any, Any]:
        state = tx.init(params)
        loss = jnp.zeros((), jnp.float32)
        extra = {"value": loss, "grad": params, "value_fn": lambda params: loss}
        extra["obj_fn"] = extra["value_fn"]
        return state, optax.with_extra_args_support(tx).update(params, state, params, **extra)[1]

    try:
        before, after = jax.eval_shape(update, params)
    except ConfigError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise ConfigError(FIELD, f"Optax cannot update these parameters: {what}") from error
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ConfigError(
                FIELD,
                f"the first update would change its state {param_paths.param_path(path)} from "
                f"{old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}; give the "
                "transformation's own dtype argument, float32 parameters, or master_dtype",
            )


@dataclasses.dataclass
class _Builder:
    """Builds transformations from sections, and notes what they do."""

    facts: Facts
    spared: Choice | None = None  # By `no_decay`.
    learning_rate: Schedule | None = None
    schedules: list[tuple[str, Schedule]] = dataclasses.field(default_factory=list)

    def chain(
        self, field: str, section: Any, scope: Choice, also: tuple[str, ...] = ()
    ) -> optax.GradientTransformation:
        """A section with a `chain`. `scope` chooses the parameters that get here."""
        if not isinstance(section, Mapping):
            raise ConfigError(field, "must be a section with a `chain`", section)
        names = section.get("chain", ())
        if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
            rule = "must be a tuple of Optax names, e.g. ('adamw',)"
            raise ConfigError(f"{field}.chain", rule, names)
        if len(set(names)) != len(names):
            rule = "a name comes twice; give one a label, scale@last, and its section that name"
            raise ConfigError(f"{field}.chain", rule, names)
        for name in names:
            find_transformation(f"{field}.chain", function_of(name))
        for name in section:
            if name not in ("chain", *names, *also):
                guess = closest(name, [*names, *also])
                raise ConfigError(f"{field}.{name}", f"not in the chain; {guess}")
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
            made = call(field, function, self.arguments(field, function, section, scope))
        if isinstance(made, optax.MultiSteps):
            made = made.gradient_transformation()
        if not isinstance(made, optax.GradientTransformation):
            raise ConfigError(named_in, f"optax.{name} does not make a gradient transformation")
        return transforms.with_slow_params(made) if name == "lookahead" else made

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
        arguments = self.arguments(f"{field}.{name}", factory, arguments, scope)
        # Optax would take a mask's function for a schedule.
        static = {*section.get("static_args", ())} | {k for k in arguments if k.endswith("mask")}
        outer = {**section, "inner_factory": factory, "static_args": tuple(sorted(static))}
        made = call(field, function, outer)
        bound(f"{field}.{name}", factory, arguments)
        return call(f"{field}.{name}", made, arguments)

    def arguments(
        self, field: str, function: Callable[..., Any], section: Mapping[str, Any], scope: Choice
    ) -> dict[str, Any]:
        """A section's values as Optax wants them, and notes of what they mean."""
        values = bound(field, function, section)
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
        if self.learning_rate is None and values.get("learning_rate") is not None:
            rate = made.get("learning_rate", values["learning_rate"])
            self.learning_rate = rate if callable(rate) else lambda step: rate
        self.decay(field, values, masks, made, scope)
        return made

    def value(self, field: str, value: Any, scope: Choice) -> Any:
        """One argument: a transformation, a schedule, a function, or the value itself."""
        if isinstance(value, Mapping):
            if "chain" in value:
                return self.chain(field, value, scope)
            if not is_schedule_section(value) and all(str(key).isdigit() for key in value):
                return {int(key): item for key, item in value.items()}
            schedule = make_schedule(field, value)
            self.schedules.append((field, schedule))
            return schedule
        if is_import_path(value):
            return import_function(field, value)
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

        made = {
            name: self.chain(f"{field}.transforms.{name}", group, choice(name))
            for name, group in sections.items()
        }
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


def _both(first: Choice, second: Choice) -> Choice:
    return lambda path: first(path) and second(path)


def _is_zero(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and value == 0)


def _dtype(field: str, name: Any) -> Any:
    try:
        return jnp.dtype(name)
    except TypeError:
        raise ConfigError(field, "not a dtype; e.g. 'float32'", name) from None
