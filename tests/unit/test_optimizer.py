"""trainer.optimizer: Optax by Optax's own names, and one line for every mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from launch.spec import ConfigError, train_spec
from trainer.mesh import abstract_mesh
from trainer.optimizer import make_optimizer
from trainer.prepare import prepare
from trainer.task import Task

SCHEDULE = {"init_value": 0.0, "peak_value": 1e-2, "warmup_steps": 10, "decay_steps": 100}
GOOD = {
    "chain": ("clip_by_global_norm", "adamw"),
    "clip_by_global_norm": {"max_norm": 1.0},
    "adamw": {
        "learning_rate": {"warmup_cosine_decay_schedule": SCHEDULE},
        "weight_decay": 0.1,
    },
}


def test_chain_is_what_optax_would_build():
    ours = make_optimizer(GOOD).tx
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(**SCHEDULE), weight_decay=0.1),
    )
    params = {"a": jnp.arange(4.0), "b": jnp.ones((2, 3))}
    grads = {"a": jnp.full(4, 7.0), "b": jnp.full((2, 3), -2.0)}
    state, expected = ours.init(params), theirs.init(params)
    our_update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(3):
        update, state = our_update(grads, state, params)
        want, expected = their_update(grads, expected, params)
        assert (update["a"] == want["a"]).all()
        assert (update["b"] == want["b"]).all()


def test_learning_rate_is_the_schedule():
    rate = make_optimizer(GOOD).learning_rate
    assert float(rate(5)) == pytest.approx(0.005)
    assert float(rate(10)) == pytest.approx(0.01)


def test_order_of_the_chain_is_the_order_given():
    config = {"chain": ("scale", "clip_by_global_norm"), "scale": {"step_size": 10.0}}
    config["clip_by_global_norm"] = {"max_norm": 1.0}
    tx = make_optimizer(config).tx
    update, _ = tx.update({"a": jnp.array([3.0])}, tx.init({"a": jnp.array([3.0])}))
    assert float(update["a"][0]) == pytest.approx(1.0)  # Clipped last; 10 if it were first.


LABELS = ((r"bias$", "biases"), (r"embedding", "frozen"), (r".*", "kernels"))
SGD = {"chain": ("sgd",), "sgd": {"learning_rate": 0.1, "momentum": 0.9}}
ADAMW = {"chain": ("adamw",), "adamw": {"learning_rate": 0.01, "weight_decay": 0.1}}
ZERO = {"chain": ("set_to_zero",)}
PARAMS = {
    "embedding": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3),
    "mlp": {"kernel": jnp.linspace(0.5, 2.0, 6).reshape(3, 2), "bias": jnp.array([1.0, -1.0])},
    "norm": {"scale": jnp.ones(2)},
}


def partition(labels=LABELS, biases=SGD, frozen=ZERO, kernels=ADAMW):
    return {
        "param_labels": labels,
        "transforms": {"biases": biases, "frozen": frozen, "kernels": kernels},
    }


def mask(**chosen):
    """A tree of PARAMS' structure; True for the names given."""
    return {
        "embedding": chosen.get("embedding", False),
        "mlp": {key: chosen.get(key, False) for key in ("kernel", "bias")},
        "norm": {"scale": chosen.get("scale", False)},
    }


BY_HAND = {
    "groups, one of them frozen, after a clip": (
        {
            "chain": ("clip_by_global_norm", "partition"),
            "clip_by_global_norm": {"max_norm": 0.5},
            "partition": partition(),
        },
        optax.chain(
            optax.clip_by_global_norm(0.5),
            optax.partition(
                {
                    "biases": optax.sgd(0.1, momentum=0.9),
                    "frozen": optax.set_to_zero(),
                    "kernels": optax.adamw(0.01, weight_decay=0.1),
                },
                {
                    "embedding": "frozen",
                    "mlp": {"kernel": "kernels", "bias": "biases"},
                    "norm": {"scale": "kernels"},
                },
            ),
        ),
    ),
    "a mask of decay": (
        {"chain": ("adamw",), "adamw": {**ADAMW["adamw"], "mask": ("kernel$", "^emb")}},
        optax.adamw(0.01, weight_decay=0.1, mask=mask(kernel=True, embedding=True)),
    ),
    "no_decay": (
        {**ADAMW, "no_decay": ("norm", "bias", "embedding")},
        optax.adamw(0.01, weight_decay=0.1, mask=mask(kernel=True)),
    ),
    "no_decay within a mask within a group": (
        {
            "no_decay": ("norm",),
            "chain": ("partition",),
            "partition": partition(
                kernels={"chain": ("adamw",), "adamw": {**ADAMW["adamw"], "mask": ".*"}}
            ),
        },
        optax.partition(
            {
                "biases": optax.sgd(0.1, momentum=0.9),
                "frozen": optax.set_to_zero(),
                "kernels": optax.adamw(0.01, weight_decay=0.1),
                "spared": optax.adam(0.01),
            },
            {
                "embedding": "frozen",
                "mlp": {"kernel": "kernels", "bias": "biases"},
                "norm": {"scale": "spared"},
            },
        ),
    ),
    "a mask around a chain": (
        {
            "chain": ("masked", "scale"),
            "masked": {"inner": {"chain": ("scale_by_adam",)}, "mask": ("mlp",)},
            "scale": {"step_size": -0.1},
        },
        optax.chain(
            optax.masked(optax.scale_by_adam(), mask(kernel=True, bias=True)), optax.scale(-0.1)
        ),
    ),
    "labels, a schedule of a joined one, decay before the rate": (
        {
            "chain": ("scale@half", "add_decayed_weights", "scale_by_schedule", "scale@sign"),
            "scale@half": {"step_size": 0.5},
            "add_decayed_weights": {"weight_decay": 0.3, "mask": "kernel"},
            "scale_by_schedule": {
                "step_size_fn": {
                    "join_schedules": {
                        "schedules": ("constant_schedule@a", "constant_schedule@b"),
                        "constant_schedule@a": {"value": 0.5},
                        "constant_schedule@b": {"value": 0.1},
                        "boundaries": (2,),
                    }
                }
            },
            "scale@sign": {"step_size": -1.0},
        },
        optax.chain(
            optax.scale(0.5),
            optax.add_decayed_weights(0.3, mask(kernel=True)),
            optax.scale_by_schedule(lambda count: jnp.where(count < 2, 0.5, 0.1)),
            optax.scale(-1.0),
        ),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_section_computes_what_optax_does_by_hand(name):
    section, theirs = BY_HAND[name]
    params, expected = (after_four_steps(tx) for tx in (make_optimizer(section).tx, theirs))
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(params["mlp"]["kernel"], PARAMS["mlp"]["kernel"])


def after_four_steps(tx):
    """PARAMS after updates with gradients of their own."""

    def step(carry, index):
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.cos(p + index), PARAMS)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jnp.arange(4)))()[0][0]


class Net(nnx.Module):
    """PARAMS as a model, of some dtype."""

    def __init__(self, dtype):
        def module(params):
            found = nnx.Module()
            for name, value in params.items():
                setattr(found, name, nnx.Param(value.astype(dtype)))
            return found

        self.embedding = nnx.Param(PARAMS["embedding"].astype(dtype))
        self.mlp, self.norm = module(PARAMS["mlp"]), module(PARAMS["norm"])


class OneModel(Task):
    def make_model(self, rngs):
        return Net(self.model_config["dtype"])

    def loss(self, model, batch):
        raise NotImplementedError

    def train_data(self, seed):
        raise NotImplementedError


def prepared(section, dtype="float32", **fields):
    config = {
        "task": "a:B",
        "num_steps": 1,
        "global_batch_size": 1,
        "mesh": {"data": 1},
        "optimizer": section,
        **fields,
    }
    spec = train_spec(config, num_devices=1)
    return prepare(spec, OneModel({"dtype": dtype}, {}), abstract_mesh(spec.mesh))


def refusal(section, **options):
    with pytest.raises(ConfigError) as caught:
        prepared(section, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 300
    return said.removeprefix("config.optimizer.")


def adamw(**arguments):
    return {"chain": ("adamw",), "adamw": {"learning_rate": 0.1, **arguments}}


def grouped(**changes):
    return {"chain": ("partition",), "partition": partition(**changes)}


def section_of(name, **arguments):
    return {"chain": (name,), name: arguments}


TAKES = "adamw takes learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov"
A_SCHEDULE = "must be a number or a schedule, e.g. {'cosine_decay_schedule': {'init_value': 1e-3,"
HERE = __name__

MISTAKES = {
    # Names.
    "transformation": (section_of("adamww"), "chain: Optax has no 'adamww'; did you mean 'adamw'?"),
    "nothing like it": (section_of("qqqq"), "chain: Optax has no 'qqqq'; known: "),
    "no transformation": (
        section_of("apply_updates"),
        "chain: optax.apply_updates makes no gradient transformation; known: apply_every, ",
    ),
    "a loss": (section_of("l2_loss"), "chain: optax.l2_loss makes no gradient transformation"),
    "refused": (section_of("dpsgd"), "chain='dpsgd': optax.dpsgd cannot be used here: it needs th"),
    "chain of chains": (
        {"chain": ("chain",)},
        "chain='chain': optax.chain cannot be used here: wri",
    ),
    "no chain": ({}, "chain=(): must be a tuple of Optax names, e.g. ('adamw',)"),
    "chain of text": ({"chain": "adamw"}, "chain='adamw': must be a tuple of Optax names, e.g."),
    "chain of numbers": ({"chain": (1,)}, "chain=(1,): must be a tuple of Optax names"),
    "name twice": (
        {"chain": ("scale", "adamw", "scale")},
        "chain=('scale', 'adamw', 'scale'): 'scale' comes twice; call one 'scale@last', say, and i",
    ),
    "label twice": (
        {"chain": ("scale@a", "scale@a")},
        "chain=('scale@a', 'scale@a'): 'scale@a' comes twice; call one 'scale@last', say, and its",
    ),
    "section of no part": (
        {**adamw(), "adam": {"b1": 0.5}},
        "adam: not in the chain ('adamw',); did you mean 'adamw'? or take it out: config.optimizer",
    ),
    "section of no part, far": (
        {**adamw(), "sgd": {}},
        "sgd: not in the chain ('adamw',); put it there, or take it out: config.optimizer.sgd=None",
    ),
    "section of no label": (
        {"chain": ("scale@last",), "scale@lst": {}},
        "scale@lst: not in the chain ('scale@last',); did you mean 'scale@last'?",
    ),
    "no section": (
        {"chain": ("adamw",), "adamw": 3},
        "adamw=3: must be a section with the argumen",
    ),
    # Arguments.
    "argument": (
        adamw(weigth_decay=1),
        f"adamw.weigth_decay: no such argument; did you mean 'weight_decay'? {TAKES}",
    ),
    "argument, far": (adamw(qqq=1), f"adamw.qqq: no such argument; {TAKES}"),
    "missing": ({"chain": ("adamw",)}, "adamw.learning_rate: missing, and it has no default; ada"),
    "text": (adamw(b1="x"), "adamw.b1='x': must be a number"),
    "tuple": (adamw(b1=(1, 2)), "adamw.b1=(1, 2): must be a number"),
    "schedule where none is taken": (
        adamw(b1={"constant_schedule": {"value": 0.9}}),
        "adamw.b1={'constant_schedule': {'value': 0.9}}: must be a number; with inject_hyperparams",
    ),
    "rate of text": (adamw(learning_rate="fast"), f"adamw.learning_rate='fast': {A_SCHEDULE}"),
    "no rate": (adamw(learning_rate=None), f"adamw.learning_rate=None: {A_SCHEDULE}"),
    "empty schedule": (adamw(learning_rate={}), "adamw.learning_rate: must have one entry, a sch"),
    "schedule": (
        adamw(learning_rate={"cosine_decay": {}}),
        "adamw.learning_rate.cosine_decay: Optax has no such schedule; did you mean 'cosine_decay_",
    ),
    "schedule's numbers": (
        adamw(learning_rate={"warmup_cosine_decay_schedule": {**SCHEDULE, "decay_steps": 5}}),
        "adamw.learning_rate.warmup_cosine_decay_schedule.decay_steps=5: must be more than warmup_",
    ),
    "bool of text": (adamw(nesterov="yes"), "adamw.nesterov='yes': must be True or False"),
    "dtype": (adamw(mu_dtype="flot32"), "adamw.mu_dtype='flot32': not a dtype; e.g. 'float32' or"),
    "transformation of text": (
        section_of("lookahead", fast_optimizer="adam", sync_period=5, slow_step_size=0.5),
        "lookahead.fast_optimizer='adam': must be a section with a `chain`, e.g. {'chain': ('adam'",
    ),
    "transformation without a chain": (
        section_of("lookahead", fast_optimizer={"adam": {}}, sync_period=5, slow_step_size=0.5),
        "lookahead.fast_optimizer={'adam': {}}: must be a section with a `chain`",
    ),
    "within another": (
        section_of("MultiSteps", opt=adamw(qqq=1), every_k_schedule=2),
        "MultiSteps.opt.adamw.qqq: no such argument",
    ),
    "factory": (
        section_of("inject_hyperparams", inner_factory="adam"),
        "inject_hyperparams.inner_factory='adam': must be a section with one entry, a transform",
    ),
    "factory's argument": (
        section_of("inject_hyperparams", inner_factory={"adam": {"lr": 1}}),
        "inject_hyperparams.inner_factory.adam.lr: no such argument; adam takes learning_rate, b1,",
    ),
    "function": (
        section_of("stateless", f="no_such_module:f"),
        "stateless.f='no_such_module:f': no module 'no_such_module'; is it on PYTHONPATH?",
    ),
    "what Optax refuses when it is called": (
        section_of("scale_by_lbfgs", memory_size=-1),
        "scale_by_lbfgs: Optax refuses it: ValueError: memory_size must be >= 1",
    ),
    "what Optax refuses when it makes state": (
        section_of("scale_by_lbfgs", memory_size=1.5),
        "scale_by_lbfgs: Optax cannot make its state for these parameters: TypeError: Shapes must",
    ),
    "what Optax refuses in an update": (
        grouped(kernels={"chain": ("clip", "scale_by_muon"), "clip": {"max_delta": 1.0}}),
        "partition.transforms.kernels.scale_by_muon: Optax cannot update these parameters: ValueEr",
    ),
    # Groups.
    "group that takes none": (
        grouped(labels=(("biass$", "biases"), *LABELS[1:])),
        "partition.param_labels (group 'biases'): 'biass$' matches no parameter; did you mean",
    ),
    "group that comes too late": (
        grouped(labels=(LABELS[2], *LABELS[:2])),
        "partition.param_labels: group 'biases' gets nothing: all that 'bias$' matches is taken by",
    ),
    "no group": (
        grouped(labels=(*LABELS[:2], ("kernel", "kernels"))),
        "partition.param_labels: no group takes norm.scale; add a pair for them, r'.*' last takes ",
    ),
    "label of no group": (
        grouped(labels=(*LABELS, ("norm", "norms"))),
        "partition.param_labels: group 'norms' has no entry in transforms, which has biases, fro",
    ),
    "group without a label": (
        grouped(labels=LABELS[1:]),
        "partition.param_labels: no expression leads to group 'biases' of transforms",
    ),
    "group without a chain": (
        grouped(biases={"sgd": {}}),
        "partition.transforms.biases.chain=(): must be a tuple of Optax names",
    ),
    "group's argument": (
        grouped(biases=section_of("sgd", lr=1)),
        "partition.transforms.biases.sgd.lr: no such argument; sgd takes learning_rate, momentum,",
    ),
    "labels that are no pairs": (
        grouped(labels=("bias",)),
        "partition.param_labels=('bias',): must be pairs (regular expression, group), e.g. ((r'bi",
    ),
    "broken expression": (
        grouped(labels=(("(bias", "biases"), *LABELS[1:])),
        "partition.param_labels[0]=('(bias',): not a regular expression: missing ), unterminated",
    ),
    "no labels": (
        section_of("partition", transforms={"a": SGD}),
        "partition.param_labels: missing, and it has no default; partition takes transforms, param",
    ),
    "no transforms": (
        section_of("partition", param_labels=LABELS, transforms=3),
        "partition.transforms=3: must have a section with a `chain` for every group",
    ),
    # Masks.
    "mask of nothing": (
        adamw(mask=("kernal",)),
        "adamw.mask: 'kernal' matches no parameter; did you mean 'kernel'?",
    ),
    "mask of no expression": (
        adamw(mask=3),
        "adamw.mask=3: must be a regular expression over parameter paths, or a tuple of them",
    ),
    "broken mask": (
        adamw(mask="("),
        "adamw.mask=('(',): not a regular expression: missing ), unte",
    ),
    "no_decay of nothing": (
        {**adamw(), "no_decay": ("nrom", "bais")},
        "no_decay: 'nrom' matches no parameter; did you mean 'norm'?",
    ),
    "no_decay that cannot be kept": (
        {**section_of("prodigy", weight_decay=0.1), "no_decay": "bias"},
        "prodigy.weight_decay: decays and takes no mask, so no_decay cannot be kept; set it to 0, ",
    ),
    # Around the chain.
    "master_dtype": (
        {**adamw(), "master_dtype": "flot32"},
        "master_dtype='flot32': must be a dtype of real numbers, e.g. 'float32'",
    ),
    "master_dtype of integers": (
        {**adamw(), "master_dtype": "int32"},
        "master_dtype='int32': must be a dtype of real numbers, e.g. 'float32'",
    ),
    "ema_decay": ({**adamw(), "ema_decay": 1.0}, "ema_decay=1.0: must be above 0 and below 1, e.g"),
    "ema_decay of text": (
        {**adamw(), "ema_decay": "x"},
        "ema_decay='x': must be above 0 and below",
    ),
    "ema_decy": (
        {**adamw(), "ema_decy": 0.9},
        "ema_decy: not in the chain ('adamw',); did you mean 'ema_decay'?",
    ),
    "skip's field": (
        {**adamw(), "skip": {"loss_sigma": 6.0}},
        "skip.loss_sigma: no such field; did you mean 'loss_sigmas'?",
    ),
    "skip's rule": (
        {**adamw(), "skip": {"window_steps": 0}},
        "skip.window_steps=0: must be at least 1",
    ),
    "skip": (
        {**adamw(), "skip": True},
        "skip=True: must be a section with fields of nonfinite, loss_sigmas, grad_norm_sigmas, win",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_its_field(name):
    section, expected = MISTAKES[name]
    assert refusal(section).startswith(expected)


def test_a_section_set_to_none_is_as_if_it_were_not_there():
    make_optimizer({**adamw(), "sgd": None, "skip": None, "ema_decay": None, "master_dtype": None})


def test_state_that_would_change_its_dtype_is_refused_and_a_master_copy_helps():
    section = {
        "chain": ("scale_by_distance_over_gradients", "scale"),
        "scale": {"step_size": -1.0},
    }
    prepared(section, dtype="float32")
    said = refusal(section, dtype="bfloat16")
    assert "would change its state 0.max_dist.embedding from bfloat16[] to float32[]" in said
    assert "float32 parameters, or master_dtype" in said
    prepared({**section, "master_dtype": "float32"}, dtype="bfloat16")


@pytest.mark.parametrize(
    ("which", "section", "keeper"),
    [
        ("ema", {"ema_decay": 0.9}, "config.optimizer.ema_decay"),
        (
            "schedule_free",
            section_of("schedule_free_sgd", learning_rate=0.1),
            "a schedule_free transformation in config.optimizer.chain",
        ),
        (
            "lookahead",
            section_of("lookahead", fast_optimizer=SGD, sync_period=5, slow_step_size=0.5),
            "lookahead in config.optimizer.chain",
        ),
    ],
)
def test_params_to_evaluate_must_be_kept_by_the_optimizer(which, section, keeper):
    evaluation = {"every_steps": 1, "params": which}
    said = refusal(adamw(), eval=evaluation)
    assert said == f"config.eval.params='{which}': nothing keeps them; {keeper}"
    prepared({**({} if "chain" in section else adamw()), **section}, eval=evaluation)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"eval": {"params": "emma"}}, "config.eval.params='emma': did you mean 'ema'?"),
        (
            {"sharding": {"optimizer_axes": ("dat",)}},
            "config.sharding.optimizer_axes=('dat',): did you mean 'data'?",
        ),
        (
            {"sharding": {"optimizer_axes": "data"}},
            "config.sharding.optimizer_axes='data': must be",
        ),
    ],
)
def test_fields_beside_the_optimizers_are_checked_too(fields, expected):
    assert refusal(adamw(), **fields).startswith(expected)
