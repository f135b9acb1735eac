"""The transformer computes what it says: causal, rotary, grouped; scan and remat change nothing."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from launch.spec import ConfigError, build
from trainer.models.attention import causal_attention
from trainer.models.head_loss import token_loss
from trainer.models.rope import Rope
from trainer.models.transformer import Transformer
from trainer.models.transformer_config import TransformerConfig
from trainer.sharding import DEFAULT_RULES

TINY = {"vocab_size": 32, "dim": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 24}
VARIANTS = [{}, {"num_kv_heads": 2, "tied_head": False}, {"scan_layers": True, "head_dim": 6}]


def create(**changes):
    with nnx.use_eager_sharding(False):
        return nnx.split(Transformer(TransformerConfig(**{**TINY, **changes}), nnx.Rngs(0)))


def make(**changes):
    """A model with any numbers in it: compiling its own random ones takes seconds."""
    graphdef, state = nnx.eval_shape(lambda: create(**changes))
    rng = np.random.default_rng(0)

    def fill(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / TINY["dim"] ** 0.5, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(fill, state))


def forward(model, tokens, segments=None):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))(state, tokens, segments)


def some_tokens(shape=(2, 8)):
    return jnp.asarray(np.random.default_rng(1).integers(TINY["vocab_size"], size=shape))


def params_of(model):
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def loss_and_grads(model, tokens):
    graphdef, state = nnx.split(model)

    def loss(state):
        return jnp.mean(jnp.square(nnx.merge(graphdef, state)(tokens)))

    value, grads = jax.jit(jax.value_and_grad(loss))(state)
    return value, {path: grad[...] for path, grad in nnx.to_flat_state(grads)}


@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_depend_on_no_later_token(changes):
    model, tokens = make(**changes), some_tokens()
    changed = tokens.at[:, 5].add(1) % TINY["vocab_size"]
    before, after = np.split(forward(model, jnp.concatenate([tokens, changed])), 2)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.all(np.any(before[:, 5:] != after[:, 5:], axis=-1))


def naive_attention(q_BQLH, k_BQMH, v_BQMH):
    """Softmax over all earlier positions, head by head, as in a textbook."""
    scores = np.einsum("bqlh,bqmh->bqlm", q_BQLH, k_BQMH)
    L = scores.shape[-1]
    scores = np.where(np.tril(np.ones((L, L), bool)), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bqlm,bqmh->bqlh", shares / shares.sum(-1, keepdims=True), v_BQMH)


def test_documents_of_a_row_see_nothing_of_each_other_and_are_predicted_as_if_alone():
    model, sizes = make(num_kv_heads=2, num_layers=1), [50, 60]
    tokens, end = some_tokens((2, 130)), 0
    segments = np.repeat([[1, 2, 0]], [*sizes, 20], axis=1).repeat(2, axis=0)
    segments = jnp.asarray(segments, jnp.int32)
    targets, expected = np.full(tokens.shape, -1), 0.0
    logits = forward(model, tokens, segments)
    for size in sizes:
        place, end = slice(end, end + size), end + size
        alone = forward(model, tokens[:, place])
        np.testing.assert_allclose(logits[:, place], alone, atol=2e-5)
        targets[:, end - size : end - 1] = tokens[:, end - size + 1 : end]
        expected += token_loss(alone[:, :-1], tokens[:, place][:, 1:]).total
    graphdef, state = nnx.split(model)
    loss = jax.jit(lambda state: nnx.merge(graphdef, state).loss(tokens, targets, segments))(state)
    assert float(loss.weight) == 2 * (49 + 59)
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-5)


# Computed in four chunks of queries, in two, and in one.
@pytest.mark.parametrize("length", [256, 130, 7])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_attention_equals_the_textbook_one_with_repeated_key_heads(length, num_groups):
    B, K, G, H = 2, 2, num_groups, 4
    rng = np.random.default_rng(0)
    q_BKGLH = rng.normal(size=(B, K, G, length, H))
    k_BKMH, v_BKMH = rng.normal(size=(2, B, K, length, H))
    ours = jax.jit(causal_attention)(*(np.float32(x) for x in (q_BKGLH, k_BKMH, v_BKMH)))
    q_BQLH = q_BKGLH.reshape(B, K * G, length, H)
    k_BQMH, v_BQMH = (np.repeat(x, G, axis=1) for x in (k_BKMH, v_BKMH))
    expected = naive_attention(q_BQLH, k_BQMH, v_BQMH)
    np.testing.assert_allclose(ours.reshape(expected.shape), expected, atol=1e-5)


def test_grouped_query_attention_equals_full_attention_with_repeated_key_heads():
    grouped, full, tokens = make(num_kv_heads=2), make(), some_tokens()
    for layer, wide in zip(grouped.layers, full.layers, strict=True):
        for name in ("key_DKH", "value_DKH"):
            repeated = jnp.repeat(getattr(layer.attention, name)[...], 2, axis=1)
            getattr(wide.attention, name)[...] = repeated
        wide.attention.query_DQH[...] = layer.attention.query_DQH[...]
        wide.attention.out_QHD[...] = layer.attention.out_QHD[...]
        wide.mlp, wide.mlp_norm, wide.attention_norm = (
            layer.mlp, layer.mlp_norm, layer.attention_norm)  # fmt: skip
    full.embedding_VD, full.norm = grouped.embedding_VD, grouped.norm
    np.testing.assert_allclose(forward(grouped, tokens), forward(full, tokens), atol=1e-5)


def test_rope_keeps_lengths_and_makes_scores_depend_on_distance_alone():
    rope = Rope.make(length=12, head_dim=8, base=100.0)
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    turned_q, turned_k = rope.turn(jnp.tile(q, (12, 1))), rope.turn(jnp.tile(k, (12, 1)))
    np.testing.assert_allclose(turned_q[0], q, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(turned_q, axis=-1), jnp.linalg.norm(q), rtol=1e-5)
    scores_LM = turned_q @ turned_k.T
    for distance in range(-11, 12):
        diagonal = np.diagonal(scores_LM, distance)
        np.testing.assert_allclose(diagonal, np.full_like(diagonal, diagonal[0]), atol=1e-4)
    assert np.ptp(scores_LM[0]) > 0.1
    np.testing.assert_allclose(rope.turn(jnp.tile(q, (12, 1)), 0.5), turned_q * 0.5, atol=1e-6)


def test_scanned_layers_equal_unrolled_ones_and_start_from_the_same_numbers():
    # In one program, where XLA finds that both draw the same numbers.
    created = jax.jit(lambda: (create()[1], create(scan_layers=True)[1]))()
    graphdefs = [nnx.eval_shape(lambda s=s: create(scan_layers=s))[0] for s in (False, True)]
    unrolled, scanned = (nnx.merge(*parts) for parts in zip(graphdefs, created, strict=True))
    stacked = scanned.layers.mlp.up_DF[...]
    np.testing.assert_array_equal(stacked[1], unrolled.layers[1].mlp.up_DF[...])
    assert not np.array_equal(stacked[0], stacked[1])
    tokens = some_tokens()
    loss, grads = loss_and_grads(unrolled, tokens)
    scanned_loss, scanned_grads = loss_and_grads(scanned, tokens)
    np.testing.assert_allclose(scanned_loss, loss, rtol=1e-6)
    for path, scanned_grad in scanned_grads.items():
        of_layers = path[0] == "layers"
        grad = scanned_grad[1] if of_layers else scanned_grad
        expected = grads[("layers", 1, *path[1:]) if of_layers else path]
        np.testing.assert_allclose(grad, expected, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize(
    ("remat", "scan_layers"), [("full", True), ("dots_saveable", False), ("keep_qkv", False)]
)
def test_remat_gives_the_same_gradients_and_recomputes(remat, scan_layers):
    tokens = some_tokens()
    plain, other = (make(scan_layers=scan_layers, remat=name) for name in ("none", remat))
    loss, grads = loss_and_grads(plain, tokens)
    other_loss, other_grads = loss_and_grads(other, tokens)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for path, grad in grads.items():
        np.testing.assert_allclose(other_grads[path], grad, atol=1e-6, err_msg=str(path))
    graphdef, state = nnx.split(other)
    assert "remat" in str(jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(tokens))(state))


def test_a_tied_head_is_the_embedding_table():
    tied, untied = make(), make(tied_head=False)
    assert not hasattr(tied, "head_DV")
    size = TINY["vocab_size"] * TINY["dim"]
    assert num_params(untied) - num_params(tied) == size
    untied.head_DV[...] = tied.embedding_VD[...].T
    for name in ("embedding_VD", "layers", "norm"):
        setattr(untied, name, getattr(tied, name))
    tokens = some_tokens()
    np.testing.assert_allclose(forward(untied, tokens), forward(tied, tokens), atol=1e-6)


def num_params(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_params_and_matmuls_have_dtypes_of_their_own():
    model = make(dtype="bfloat16")
    assert {param[...].dtype for _, param in params_of(model)} == {jnp.dtype("float32")}
    graphdef, state = nnx.split(model)
    program = jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(some_tokens()))(state)
    dots = [eqn for eqn in all_eqns(program.jaxpr) if eqn.primitive.name == "dot_general"]
    assert {var.aval.dtype for eqn in dots for var in eqn.invars} == {jnp.dtype("bfloat16")}
    # Seven projections and two of attention per layer, and the head. Scores and logits are wide.
    assert len(dots) == 2 * 9 + 1
    assert sum(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in dots) == 2 + 1
    logits = forward(model, some_tokens())
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(make(), some_tokens()), atol=0.02)
    half = make(param_dtype="bfloat16")
    assert {param[...].dtype for _, param in params_of(half)} == {jnp.dtype("bfloat16")}


def all_eqns(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from all_eqns(inner)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_param_names_each_of_its_dims_and_every_name_has_a_rule(changes):
    for path, param in params_of(make(**changes)):
        names = param.get_metadata()["out_sharding"]
        assert len(names) == param[...].ndim, path
        assert set(names) <= set(DEFAULT_RULES), path
        assert (names[0] == "layers") == (path[0] == "layers" and "scan_layers" in changes), path


def test_fresh_logits_are_small_so_that_training_begins_at_chance():
    changes = {"vocab_size": 256, "dim": 64}
    graphdef, _ = nnx.eval_shape(lambda: create(**changes))
    model = nnx.merge(graphdef, jax.jit(lambda: create(**changes)[1])())
    tokens = some_tokens((4, 32))
    log_shares = jax.nn.log_softmax(forward(model, tokens))
    repeated = jnp.take_along_axis(log_shares, tokens[..., None], axis=-1)
    assert abs(-log_shares.mean() - np.log(256)) < 0.1
    assert abs(-repeated.mean() - np.log(256)) < 1  # Though the head is the embedding table.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide num_heads=4; use one of 1, 2, 4"),
        ({"num_heads": 3}, "num_heads=3: must divide dim=16; use one of 1, 2, 4, 8, 16"),
        ({"num_heads": 16}, "num_heads=16: gives heads of width 1, which must be even"),
        ({"head_dim": 5}, "head_dim=5: gives heads of width 5, which must be even"),
        ({"remat": "dots_savable"}, "remat='dots_savable': did you mean 'dots_saveable'?"),
        ({"remat": "keep_kqv"}, "remat='keep_kqv': did you mean 'keep_qkv'?"),
        ({"attention": "flash"}, "attention='flash': did you mean 'splash'?"),
        ({"mlp_chunk": -1}, "mlp_chunk=-1: must be 0 (all) or more"),
        ({"loss_chunk": 0}, "loss_chunk=0: must be at least 1"),
        ({"dtype": "float31"}, "dtype='float31': did you mean 'float32'?"),
        ({"num_layers": 0}, "num_layers=0: must be at least 1"),
        ({"z_loss": -1.0}, "z_loss=-1.0: must be 0 (off) or more"),
        ({"num_layer": 2}, "num_layer: no such field; did you mean 'num_layers'?"),
        ({"mlp_dim": 2.5}, "mlp_dim=2.5: must be int, is float"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError) as caught:
        build(TransformerConfig, {**TINY, **changes}, "config.model")
    assert str(caught.value).startswith(f"config.model.{message}")
