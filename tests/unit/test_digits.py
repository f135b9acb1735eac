"""Digits: which images there are, how they are moved, and that a sharded batch norm is right."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from launch.spec import ConfigError, MeshSpec
from tests.testing.packages import required_package
from trainer.mesh import batch_sharding, make_mesh
from trainer.sharding import make_rules
from trainer.state import init_state, make_layout
from trainer.step import compile_train_step, make_train_step
from trainer.tasks.digits import Digits, load_split, shifted

required_package("sklearn")

MODEL = {"channels": (4,), "dropout": 0.0}


def test_every_image_is_either_trained_on_or_held_out():
    split = load_split(eval_every=7)
    assert (len(split.train), len(split.held_out)) == (1541, 256)
    everything = sorted(np.concatenate([split.train.images, split.held_out.images]).tolist())
    assert everything == sorted(load_digits().images.astype(int).tolist())
    assert set(split.held_out.labels) == set(range(10))
    assert split.train.images.max() == 16


def load_digits():
    from sklearn import datasets

    return datasets.load_digits()


def test_training_images_are_moved_anew_each_epoch_but_by_index_alone():
    data, again = (Digits(MODEL, {"max_shift": 2}).train_data(seed=3) for _ in range(2))
    plain = Digits(MODEL, {"max_shift": 0}).train_data(seed=3)
    late = [(data[i], again[i], plain[i]) for i in (5000, 4999, 0, 7)]  # Any order will do.
    for moved, same, still in late:
        np.testing.assert_array_equal(moved["image"], same["image"])
        assert moved["label"] == still["label"]
    epoch = len(load_split(7).train)
    places = {bytes(still["image"]): i for i in range(epoch) for still in [plain[i]]}
    changed = 0
    for i in range(epoch, epoch + 20):
        first = data[places[bytes(plain[i]["image"])]]
        changed += not np.array_equal(data[i]["image"], first["image"])
    assert changed > 10


def test_a_shifted_image_is_the_image_elsewhere():
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        moved = shifted({"image": image, "label": 5}, rng, max_shift=1)
        assert moved["label"] == 5
        assert moved["image"].shape == (8, 8)
        down, right = np.argwhere(moved["image"] == image[4, 4])[0] - 4
        seen.add((int(down), int(right)))
        framed = np.pad(image, 1)
        expected = framed[1 - down : 9 - down, 1 - right : 9 - right]
        np.testing.assert_array_equal(moved["image"], expected)
    assert seen == {(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)}


def test_held_out_images_stay_where_they_are():
    task = Digits(MODEL, {"max_shift": 3})
    held_out = task.eval_data()
    split = load_split(7)
    for i in (0, 100, 255):
        np.testing.assert_array_equal(held_out[i]["image"], split.held_out.images[i])


def update(mesh_spec):
    """Model's leaves by name after two updates on a mesh, with the shardings of their layout."""
    devices = mesh_spec.data * mesh_spec.fsdp
    mesh = make_mesh(mesh_spec, jax.devices()[:devices])
    task = Digits({**MODEL, "norm": "batch"}, {})
    layout = make_layout(task, optax.sgd(0.1), mesh, make_rules((), mesh), seed=0)
    data = task.train_data(0)
    rows = [data[i] for i in range(16)]
    batch = jax.device_put(
        {key: np.stack([row[key] for row in rows]) for key in ("image", "label")},
        batch_sharding(mesh),
    )
    abstract = {
        key: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
        for key, value in batch.items()
    }
    step = compile_train_step(make_train_step(task, layout), layout, abstract)
    leaves = init_state(layout)
    for _ in range(2):
        leaves, _ = step(leaves, batch)
    return {
        name: np.asarray(leaf)
        for name, leaf in layout.as_dict(leaves).items()
        if name.startswith("model.blocks")
    }


def test_batch_statistics_are_those_of_the_global_batch_and_part_of_the_state():
    alone = update(MeshSpec(data=1))
    sharded = update(MeshSpec(data=4, fsdp=2))
    assert {"model.blocks.0.norm.mean", "model.blocks.0.norm.var"} <= set(alone)
    assert np.abs(alone["model.blocks.0.norm.mean"]).max() > 1e-3  # They have moved from 0.
    for name, expected in alone.items():
        np.testing.assert_allclose(sharded[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_an_evaluated_image_does_not_depend_on_those_beside_it(norm):
    task = Digits({**MODEL, "norm": norm, "dropout": 0.5}, {})

    @jax.jit
    def logits(images):
        model = task.make_model(nnx.Rngs(0))
        model.eval()
        return model(images / 16)

    images = load_split(7).held_out.images[:3]
    others = images.copy()
    others[1:] = images[:2]
    np.testing.assert_array_equal(logits(images)[0], logits(others)[0])
    assert not np.array_equal(logits(images)[1], logits(others)[1])


def test_the_loss_is_the_cross_entropy_and_the_accuracy_counts_what_is_right():
    task = Digits(MODEL, {})
    labels = load_split(7).held_out.labels

    def sure(images):  # Of the right digit, but for the first three images.
        return 10.0 * jax.nn.one_hot(jnp.where(jnp.arange(len(images)) < 3, 11, labels), 10)

    batch = {"image": jnp.zeros((256, 8, 8), jnp.uint8), "label": labels}
    total, weight = task.loss(sure, batch)
    of_right = np.log(1 + 9 * np.exp(-10))
    assert float(weight) == 256
    assert float(total) == pytest.approx(3 * np.log(10) + 253 * of_right, rel=1e-4)
    right = int(np.sum(labels[:3] == 0))  # Of equal logits the first is taken.
    results = task.finish(sure, jax.random.key(0))
    assert int(results["num_right"]) == 253 + right
    assert task.show({"num_right": 250}) == "accuracy on 256 held-out digits: 97.66% (6 wrong)"


def test_flops_are_six_for_every_multiplication_by_a_weight():
    task = Digits({"channels": (4, 8)}, {})
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(lambda: task.make_model(nnx.Rngs(0)))
    counted = 64 * 9 * 4 + 16 * 9 * 4 * 8 + 2 * 2 * 8 * 10
    assert task.flops_per_example(model) == 6 * counted


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"channels": ()}, {}, "config.model.channels=(): must be at least 1"),
        ({"channels": (4, 4, 4, 4)}, {}, "config.model.channels=(4, 4, 4, 4): has 4 blocks"),
        ({"norm": "bach"}, {}, "config.model.norm='bach': did you mean 'batch'?"),
        ({"dropout": 1.0}, {}, "config.model.dropout=1.0: must be in [0, 1)"),
        ({}, {"eval_every": 1}, "config.data.eval_every=1: must be at least 2"),
        ({}, {"max_shift": 8}, "config.data.max_shift=8: must be in [0, 8)"),
    ],
)
def test_a_section_that_cannot_be_is_refused_by_name(model, data, message):
    with pytest.raises(ConfigError) as caught:
        Digits(model, data)
    assert str(caught.value).startswith(message)


def test_without_scikit_learn_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="not installed; run: pip install scikit-learn") as caught:
        Digits(MODEL, {})
    assert caught.value.field == "config.task"
