"""What a layer keeps of its forward pass for its backward pass; the rest is computed again.

`config.model.remat` names a policy. From the least memory to the most, see docs/step.md:

    full                nothing but the layer's input
    keep_attention      the attention kernel's output and logsumexp: it is not run again
    keep_qkv            also queries, keys and values: none of their projections are computed again
    keep_all_but_mlp    also the attention's output as it joins the residual stream
    (JAX's own)         `dots_with_no_batch_dims_saveable`, ... by their names
    none                everything

Whatever the policy, gathered weights are never kept: that would be the whole model on each device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trainer.models.gather import GATHERED
from trainer.models.place import Place
from trainer.models.transformer_config import REMAT_POLICIES

# Names of what a layer computes, for the policies below.
QUERY_KEY_VALUE = "query_key_value"
ATTENTION = "attention"
ATTENTION_OUT = "attention_out"

_KEPT = {
    "full": (),
    "keep_attention": (ATTENTION,),
    "keep_qkv": (ATTENTION, QUERY_KEY_VALUE),
    "keep_all_but_mlp": (ATTENTION, QUERY_KEY_VALUE, ATTENTION_OUT),
}
assert set(_KEPT) == set(REMAT_POLICIES)


def rematerialized(apply: Callable, remat: str, place: Place, *, prevent_cse: bool) -> Callable:
    """`apply` under the policy called `remat`.

    Args:
      apply: a pure function.
      remat: of `config.model.remat`.
      place: where weights are gathered.
      prevent_cse: as for `jax.checkpoint`; not needed inside of a scan.
    """
    if remat == "none" and not place.batch:
        return apply
    return jax.checkpoint(apply, policy=_policy(remat), prevent_cse=prevent_cse)


def lightly(part: Callable, remat: str) -> Callable:
    """`part` of a layer, keeping nothing inside of it, where the whole layer keeps but a few names.

    For parts whose backward pass needs again only what is cheap (a norm, a transposed copy): the
    projections in them are linear. Without it, what is computed again for a layer stays until it is
    used, and that is up to six arrays [N, D] at a time.
    """
    if remat not in _KEPT:
        return part
    return jax.checkpoint(lambda *args: part(*together(args)))


@jax.custom_vjp
def together(args: Any) -> Any:
    """The arguments of a function; their gradients are computed together, at one time.

    XLA puts off a weight's gradient until it is scattered, and keeps what it is computed from.
    """
    return args


together.defvjp(lambda args: (args, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


def cast_in_loop(state: Any, x_ND: jax.Array) -> Any:
    """A layer's float32 parameters, multiplied by a one that XLA on TPU cannot see to be one.

    Else it casts the shards of all layers in front of the loop over them, and keeps them through
    both passes: two bytes more for each parameter. The factor depends on the layer's input, so that
    it has to be computed in the loop.
    """
    first = jax.lax.stop_gradient(x_ND[0, 0]).astype(jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(first, jnp.int16).astype(jnp.int32)
    one = jnp.where(bits == 1 << 20, 2.0, 1.0)  # 16 bits are never that many.
    return jax.tree.map(lambda leaf: leaf * one.astype(leaf.dtype), state)


def _policy(remat: str) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    if remat in _KEPT:
        return policies.save_only_these_names(*_KEPT[remat])
    policy = getattr(policies, "everything_saveable" if remat == "none" else remat)

    def but_gathered(primitive: Any, *args: Any, **params: Any) -> Any:
        gathers = primitive.name == "all_gather" or params.get("name") == GATHERED
        return False if gathers else policy(primitive, *args, **params)

    return but_gathered
