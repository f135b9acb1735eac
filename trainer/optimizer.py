"""A config's `optimizer` section as an Optax transformation, by Optax's own names.

docs/optimizer.md says how a section is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from launch.spec import ConfigError, build
from trainer import param_paths, transforms
from trainer.chain import ChainBuilder, Facts
from trainer.optax_names import in_a_line, is_dtype
from trainer.schedules import Schedule

FIELD = "config.optimizer"

# Fields of the whole section; every other one belongs to the chain.
_AROUND = ("ema_decay", "master_dtype", "no_decay", "skip")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An Optax transformation and what is worth knowing of it.

    Attributes:
      tx: the transformation.
      learning_rates: group -> learning rate by count of updates, of the first transformation of
        its chain that takes one; the group "" is all params.
      schedules: every schedule with its field.
      skip: which updates are left out; None for none.
      facts: about parameters.
    """

    tx: optax.GradientTransformation
    learning_rates: dict[str, Schedule]
    schedules: list[tuple[str, Schedule]]
    skip: transforms.SkipSpec | None
    facts: Facts

    @property
    def learning_rate(self) -> Schedule | None:
        """The rate to name when there is to be one: of all params, or else of the last group,
        which takes what the others left. None when no transformation takes one.
        """
        rates = self.learning_rates
        return rates.get("", next(reversed(rates.values()), None))


def make_optimizer(config: Mapping[str, Any]) -> Optimizer:
    """Build the transformation that a section describes. Makes no array.

    Args:
      config: the section, plain: dicts and tuples.

    Raises:
      ConfigError: an unknown name or argument (with the closest match), a missing argument, a
        section that the chain does not use, or what Optax itself refuses.
    """
    builder = ChainBuilder(Facts())
    if config.get("no_decay") is not None:
        field = f"{FIELD}.no_decay"
        patterns = param_paths.compile_patterns(field, config["no_decay"])
        builder.spared = param_paths.any_of(patterns)
        builder.facts.checks.append(lambda paths: param_paths.check_some(field, patterns, paths))
    tx = builder.chain(FIELD, config, lambda path: True, also=_AROUND)
    if (dtype := config.get("master_dtype")) is not None:
        tx = transforms.master_weights(tx, _dtype(f"{FIELD}.master_dtype", dtype))
    if (decay := config.get("ema_decay")) is not None:
        if not isinstance(decay, float) or not 0 < decay < 1:
            rule = "must be above 0 and below 1, e.g. 0.999; None for no average"
            raise ConfigError(f"{FIELD}.ema_decay", rule, decay)
        tx = transforms.average_params(tx, decay)
    skip = None
    if config.get("skip") is not None:
        skip = build(transforms.SkipSpec, config["skip"], f"{FIELD}.skip")
        tx = transforms.skip_bad_steps(tx, skip)
    return Optimizer(tx, builder.learning_rates, builder.schedules, skip, builder.facts)


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
        extra = {"value": loss, "grad": params, "value_fn": optax.tree.norm}
        return state, optax.with_extra_args_support(tx).update(params, state, params, **extra)[1]

    try:
        before, after = jax.eval_shape(update, params)
    except ConfigError:
        raise
    except Exception as error:
        rule = f"Optax cannot update these parameters: {in_a_line(error)}"
        raise ConfigError(FIELD, rule) from error
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ConfigError(FIELD, "the first update would change the structure of its state")
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


def _dtype(field: str, name: Any) -> Any:
    if not is_dtype(name) or not jnp.issubdtype(jnp.dtype(name), jnp.floating):
        raise ConfigError(field, "must be a dtype of real numbers, e.g. 'float32'", name)
    return jnp.dtype(name)
