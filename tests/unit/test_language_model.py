"""The built-in task: its data, its loss, and what the ledger says of its compiled step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from launch.spec import ConfigError, MeshSpec, train_spec
from tests.testing import tiny
from trainer.data.feed import Feed
from trainer.data.records import write_token_records
from trainer.ledger import make_ledger
from trainer.mesh import make_mesh
from trainer.models.head_loss import token_loss
from trainer.optimizer import make_optimizer
from trainer.sharding import make_rules
from trainer.state import make_layout
from trainer.step import compile_train_step, make_train_step
from trainer.task import load_task
from trainer.tasks.language_model import LanguageModel, printable, sample

MODEL = {"vocab_size": 256, "dim": 32, "num_layers": 1, "mlp_dim": 64}
MODEL |= {"num_heads": 4, "num_kv_heads": 2}
DATA = {"kind": "bytes", "path": "-", "seq_len": 32}
LICENSE = str(tiny.ROOT / "LICENSE")


def test_bytes_are_split_into_training_rows_and_held_out_rows_that_do_not_overlap():
    data = {"kind": "bytes", "path": LICENSE, "seq_len": 32, "eval_every": 5}
    task = LanguageModel(MODEL, data)
    text = Path(LICENSE).read_bytes()
    held_out = task.eval_data()
    assert held_out is not None
    held = {bytes(held_out[i]["tokens"]) for i in range(len(held_out))}
    train = task.train_data(0)
    seen = {bytes(train[i]["tokens"]) for i in range(200)}
    assert all(row in text for row in held | seen)
    assert not held & seen
    assert all(len(row) == 33 for row in held | seen)


def test_array_records_of_tokens_are_trained_on_and_held_out(tmp_path):
    rows = [np.arange(i, i + 9) for i in range(20)]
    write_token_records(str(tmp_path / "train.array_record"), rows[:16])
    write_token_records(str(tmp_path / "eval.array_record"), rows[16:])
    data = {"kind": "array_record", "seq_len": 8, "path": str(tmp_path / "train.array_record")}
    task = LanguageModel(MODEL, {**data, "eval_path": str(tmp_path / "eval.array_record")})
    train, held_out = task.train_data(1), task.eval_data()
    assert sorted(int(train[i]["tokens"][0]) for i in range(16)) == list(range(16))
    assert held_out is not None
    assert [int(held_out[i]["tokens"][0]) for i in range(4)] == [16, 17, 18, 19]
    assert LanguageModel(MODEL, data).eval_data() is None
    with pytest.raises(ConfigError, match="seq_len"):
        LanguageModel(MODEL, {**data, "seq_len": 9}).train_data(1)[0]


def test_the_loss_is_the_cross_entropy_and_z_loss_adds_to_it():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
    targets = jnp.array([[0, 1, 2], [3, 4, 6]])
    log_p = jax.nn.log_softmax(logits)
    expected = -sum(float(log_p[b, i, targets[b, i]]) for b in range(2) for i in range(3))
    total, weight = token_loss(logits, targets)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(weight) == 6
    extra = 0.1 * float(jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2))
    assert float(token_loss(logits, targets, 0.1).total) == pytest.approx(expected + extra)


def test_the_ledger_and_the_batch_are_the_arguments_of_the_compiled_step():
    spec = train_spec(tiny.get_config("lm"), num_devices=8)
    task = load_task(spec.task, spec.model, spec.data)
    mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
    tx = make_optimizer(spec.optimizer).tx
    layout = make_layout(task, tx, mesh, make_rules((), mesh), spec.seed)
    feed = Feed(task.train_data(0), spec.global_batch_size, mesh, "data", num_prefetch=0)
    batch = feed.abstract()
    compiled = compile_train_step(make_train_step(task, layout), layout, batch)
    batch_bytes = spec.global_batch_size // 4 * 33  # uint8, split over data and fsdp.
    expected = make_ledger(layout).device_bytes + batch_bytes
    assert compiled.memory_analysis().argument_size_in_bytes == expected


def test_a_sample_is_safe_to_print():
    assert printable(np.array([72, 105, 10, 27, 200])) == "Hi\n·\ufffd"


def test_targets_are_the_inputs_moved_by_one():
    class Echo:
        """Is sure that each token's successor is the token plus one."""

        def loss(self, tokens, targets):
            return token_loss(50.0 * jax.nn.one_hot(tokens + 1, 256), targets)

    rising = jnp.arange(24, dtype=jnp.uint8).reshape(2, 12)
    loss = LanguageModel(MODEL, DATA).loss(Echo(), {"tokens": rising})
    assert float(loss.total) == pytest.approx(0, abs=1e-3)
    assert float(loss.weight) == 2 * 11


def mixed(**source):
    return {"path": "", "mixture": {"a": source}}


def is_class(example):
    return b"class" in bytes(example["tokens"])


def test_text_is_packed_file_by_file_filtered_and_mixed(tmp_path):
    texts = {"a/1": b"class A", "a/2": b"nothing", "a/3": b"class C", "b/1": b"in b", "b/2": b"bb"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    source = {name: {"path": str(tmp_path / name), "weight": 1} for name in "ab"}
    source["a"] |= {"weight": 3, "keep": f"{__name__}:is_class"}
    data = {"kind": "bytes", "seq_len": 15, "packing": True, "eval_every": 0, "mixture": source}
    task = LanguageModel(MODEL, data)
    assert task.describe().splitlines() == [
        "data: a mixture of",
        "   75.0% a: 21 bytes of text in 3 files; "
        "2 documents in 1 rows of 16 tokens, 87.5% of which are no padding",
        "   25.0% b: 6 bytes of text in 2 files; "
        "2 documents in 1 rows of 16 tokens, 37.5% of which are no padding",
    ]
    train = task.train_data(0)
    rows = [train[i] for i in range(8)]
    assert sorted(bytes(row["tokens"]) for row in rows) == (
        [b"class Aclass C\0\0"] * 6 + [b"in bbb" + bytes(10)] * 2
    )
    spec = task.example_spec()
    assert {name: (value.shape, value.dtype) for name, value in rows[0].items()} == {
        name: (value.shape, value.dtype) for name, value in spec.items()
    }
    assert task.eval_data() is None
    held_out = LanguageModel(MODEL, {**data, "eval_every": 2, "mixture": {"b": source["b"]}})
    assert bytes(held_out.eval_data()[0]["tokens"]) == b"bb" + bytes(14)


def test_only_tokens_of_the_same_document_are_targets():
    seen = []

    class Model:
        def loss(self, *arrays):
            seen.extend(arrays)

    batch = {"tokens": jnp.array([[5, 6, 7, 8, 9, 0]], jnp.uint8)}
    batch["segment_ids"] = jnp.array([[1, 1, 2, 2, 2, 0]])
    LanguageModel(MODEL, DATA).loss(Model(), batch)
    assert [array.tolist()[0] for array in seen] == [
        [5, 6, 7, 8, 9],
        [6, -1, 8, 9, -1],
        [1, 1, 2, 2, 2],
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_palms_six_n_and_attention_per_token(tied):
    it = LanguageModel({**MODEL, "tied_head": tied}, DATA)
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(lambda: it.make_model(nnx.Rngs(0)))
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32
    multiplied = 256 * 32 + layer + 32  # The head, tied or not; a lookup multiplies nothing.
    assert it.flops_per_example(model) == 32 * (6 * multiplied + 12 * 1 * 32 * 32)
    assert it.tokens_per_example() == 32


@pytest.mark.parametrize("window", [3, 20])
def test_a_sample_is_drawn_token_by_token_from_what_came_before(window):
    class Counter:
        """Is sure of the token plus one, after tokens that rise by one; else of token 0."""

        def __call__(self, tokens):
            rises = jnp.pad(jnp.diff(tokens) == 1, ((0, 0), (1, 0)), constant_values=True)
            rose = jnp.cumprod(rises, axis=-1)
            return 1e4 * jax.nn.one_hot(rose * (tokens + 1), 256)

    def draw(key):
        return sample(Counter(), key, start=10, length=6, window=window)

    assert jax.jit(draw)(jax.random.key(0)).tolist() == [11, 12, 13, 14, 15, 16]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"vocab_size": 100}, {}, "config.model.vocab_size=100: bytes need 256 token ids"),
        ({}, {"kind": "byte"}, "config.data.kind='byte': did you mean 'bytes'?"),
        ({}, {"path": ""}, "config.data.path='': empty"),
        ({}, {"path": 3}, "config.data.path=3: must be a path or a tuple of paths"),
        ({}, {"seq_len": 0}, "config.data.seq_len=0: must be at least 1"),
        ({}, {"seqlen": 8}, "config.data.seqlen: no such field; did you mean 'seq_len'?"),
        ({}, {"keep": "short"}, "config.data.keep='short': must be package.module:function"),
        ({}, {"mixture": {"a": {"weight": 1}}}, "config.data.path='-': each source of mixture"),
        ({}, mixed(weight=1), "config.data.mixture.a.path='': empty"),
        ({}, mixed(path="-"), "config.data.mixture.a.weight: missing"),
        ({}, mixed(path="-", weight=-1), "config.data.mixture.a.weight=-1: must be a number"),
        (
            {},
            mixed(path="-", wieght=1),
            "config.data.mixture.a.wieght: no such field; did you mean 'weight'?",
        ),
        (
            {},
            mixed(path="-", seq_len=9, weight=1),
            "config.data.mixture.a.seq_len=9: is the same for all",
        ),
        ({"num_kv_heads": 3}, {}, "config.model.num_kv_heads=3: must divide num_heads=4"),
    ],
)
def test_a_section_that_cannot_be_is_refused_by_name(model, data, message):
    with pytest.raises(ConfigError) as caught:
        LanguageModel({**MODEL, **model}, {**DATA, **data})
    assert str(caught.value).startswith(message)
