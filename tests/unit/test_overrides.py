"""Overrides in the sections that take fields which the file does not have."""

from __future__ import annotations

import pytest

from launch.request import make_request
from launch.spec import ConfigError, load_config

CONFIG = """
from ml_collections import config_dict

def get_config():
    cosine = {"init_value": 1e-3, "decay_steps": 100}
    steps = {"init_value": 1, "boundaries_and_scales": {30: 0.1}}
    return config_dict.ConfigDict({
        "num_steps": 5,
        "env": {"OLD": "1"},
        "optimizer": {
            "chain": ("scale@first", "adamw"),
            "scale@first": {"step_size": 1},
            "adamw": {
                "learning_rate": {"cosine_decay_schedule": cosine},
                "b1": 0.9,
                "nesterov": False,
                "mu_dtype": None,
            },
            "sgd": {"learning_rate": {"piecewise_constant_schedule": steps}},
        },
    })
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def optimizer(file, *overrides):
    """The optimizer section after `--config.optimizer.OVERRIDE`."""
    arguments = [f"--config.optimizer.{override}" for override in overrides]
    return load_config("config", [f"--config={file}", *arguments]).config.optimizer.to_dict()


def test_a_missing_argument_is_added_with_the_sections_on_the_way(file):
    schedule = optimizer(file, "adamw.learning_rate.cosine_decay_schedule.alpha=0.1")["adamw"]
    assert schedule["learning_rate"]["cosine_decay_schedule"] == {
        "init_value": 1e-3,
        "decay_steps": 100,
        "alpha": 0.1,
    }
    found = optimizer(
        file, "lion.learning_rate.constant_schedule.value=2", "scale@last.step_size=3"
    )
    assert found["lion"] == {"learning_rate": {"constant_schedule": {"value": 2}}}
    assert found["scale@last"] == {"step_size": 3}


def test_the_section_itself_may_be_missing(tmp_path):
    path = tmp_path / "bare.py"
    path.write_text("from ml_collections import ConfigDict\nget_config = ConfigDict\n")
    assert optimizer(path, "chain=('sgd',)", "sgd.learning_rate=1") == {
        "chain": ("sgd",),
        "sgd": {"learning_rate": 1},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("-1", -1),
        ("TRUE", True),
        ("false", False),
        ("None", None),
        ("bfloat16", "bfloat16"),
        ("'1'", "1"),
        ("", ""),
        ("('norm$', 'bias$')", ("norm$", "bias$")),
        (r"('\d+$',)", (r"\d+$",)),
        ("(norm|bias)$", "(norm|bias)$"),
        ("a=b", "a=b"),
        ("{'x': (1, 2.0)}", {"x": (1, 2.0)}),
    ],
)
def test_a_value_is_a_literal_or_else_a_string(file, text, value, recwarn):
    for name in ("new", "b1", "mu_dtype", "learning_rate", "nesterov"):
        found = optimizer(file, f"adamw.{name}={text}")["adamw"][name]
        assert found == value
    assert type(optimizer(file, f"adamw.new={text}")["adamw"]["new"]) is type(value)
    assert not recwarn.list


def test_type_and_shape_of_what_the_file_has_may_change(file):
    assert optimizer(file, "scale@first.step_size=0.5")["scale@first"] == {"step_size": 0.5}
    assert optimizer(file, "adamw.learning_rate=3e-4")["adamw"]["learning_rate"] == 3e-4
    below_a_number = optimizer(file, "adamw.b1.constant_schedule.value=0.8")["adamw"]
    assert below_a_number["b1"] == {"constant_schedule": {"value": 0.8}}
    assert optimizer(file, "adamw={'b1': 0.5}", "adamw.b2=0.6")["adamw"] == {"b1": 0.5, "b2": 0.6}
    name = "sgd.learning_rate.piecewise_constant_schedule.boundaries_and_scales"
    scales = optimizer(file, f"{name}.30=0.5")["sgd"]["learning_rate"]
    assert scales["piecewise_constant_schedule"]["boundaries_and_scales"] == {30: 0.5}


def test_a_bool_of_the_file_needs_no_value(file):
    assert optimizer(file, "adamw.nesterov")["adamw"]["nesterov"] is True
    arguments = [f"--config={file}", "--noconfig.optimizer.adamw.nesterov"]
    assert load_config("config", arguments).config.optimizer.adamw.nesterov is False


def test_fields_tied_by_a_reference_stay_tied_while_the_type_fits(tmp_path):
    path = tmp_path / "tied.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    config = ConfigDict({'num_steps': 5, 'optimizer': {'s': {}}})\n"
        "    config.optimizer.s.decay_steps = config.get_ref('num_steps')\n"
        "    return config\n"
    )
    assert optimizer(path)["s"]["decay_steps"] == 5
    arguments = [f"--config={path}", "--config.num_steps=7"]
    assert load_config("config", arguments).config.optimizer.s.decay_steps == 7
    arguments += ["--config.optimizer.s.decay_steps=9"]
    assert load_config("config", arguments).config.num_steps == 9
    config = load_config("config", [*arguments, "--config.optimizer.s.decay_steps=9.5"]).config
    assert (config.num_steps, config.optimizer.s.decay_steps) == (9, 9.5)


def test_the_trainer_makes_the_same_config_of_what_the_launcher_hands_on(file, tmp_path):
    file.write_text(
        CONFIG.replace('"num_steps": 5', '"num_steps": 5, "task": "a:B"').replace(
            '"env": {"OLD": "1"}', '"global_batch_size": 8'
        )
    )
    arguments = [
        "--config.optimizer.adamw.learning_rate",
        "{}",
        "--config.optimizer.adamw.learning_rate.constant_schedule.value=1",
        "--config.optimizer.adamw.nesterov",
        "--config.num_steps=9",
        "--config.optimizer.adamw.b1=1",
        "--config.optimizer.adamw.b1=None",
        "--config.optimizer.adamw.mask=('a b', \"it's\")",
        "--config.optimizer.chain=('adamw',)",
    ]
    first = load_config("config", [f"--config={file}", *arguments]).config
    cluster = "--cluster=configs/cluster/local.py"
    request = make_request(
        [f"--config={file}", cluster, *arguments], {"workdir": str(tmp_path / "run")}, ["muster"]
    )
    handed_on = [word for word in request.program.argv if word.startswith("--config")]
    assert len(handed_on) == 9
    again = load_config("config", handed_on).config
    assert again.to_dict() == first.to_dict() == request.config.to_dict()
    assert again.optimizer.adamw.to_dict() == {
        "learning_rate": {"constant_schedule": {"value": 1}},
        "b1": None,
        "nesterov": True,
        "mu_dtype": None,
        "mask": ("a b", "it's"),
    }


MISTAKES = {
    "elsewhere": (["num_step=1"], "config.num_step: no such field; did you mean 'num_steps'?"),
    "its own name": (
        ["optimzer.x=1"],
        "config.optimzer.x: no such field; did you mean 'optimizer'?",
    ),
    "beside it": (["optimizers.x=1"], "config.optimizers.x: no such field; did you mean"),
    "config.env": (["env.NEW=1"], "config.env.NEW: no such field"),
    "no value": (
        ["optimizer.adamw.b2"],
        "config.optimizer.adamw.b2: needs a value; write --config",
    ),
    "no value, more": (["optimizer.adamw.b2", "num_steps=1"], "config.optimizer.adamw.b2: needs"),
    "empty name": (["optimizer.adamw.=1"], "config.optimizer.adamw.: '' cannot be a field"),
    "index": (["optimizer.chain[0]=1"], "config.optimizer.chain[0]: 'chain[0]' cannot be a field"),
    "a set": (["optimizer.x={1}"], "config.optimizer.x='{1}': must be numbers, strings"),
    "dotted": (["optimizer.x={'a.b': 1}"], "config.optimizer.x=\"{'a.b': 1}\": must be numbers"),
    "undone above": (
        ["optimizer.adamw.b2=1", "optimizer.adamw={}"],
        "config.optimizer.adamw: would undo --config.optimizer.adamw.b2=1 before it; swap",
    ),
    "undone below": (
        ["optimizer.adamw.b1=0.5", "optimizer.adamw.b1.constant_schedule.value=1"],
        "config.optimizer.adamw.b1.constant_schedule.value: would undo --config.optimizer.adamw.b1",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(file, name):
    overrides, message = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        load_config("config", [f"--config={file}", *(f"--config.{o}" for o in overrides)])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_environment_of_a_cluster_takes_new_strings(file):
    arguments = [f"--cluster={file}", "--cluster.env.NEW=x=1", "--cluster.env.OLD=2"]
    env = load_config("cluster", arguments).config.env
    assert env.to_dict() == {"NEW": "x=1", "OLD": "2"}
    with pytest.raises(ConfigError, match=r"cluster\.env\.A\.B: no such field; cluster\.env\.A is"):
        load_config("cluster", [f"--cluster={file}", "--cluster.env.A.B=1"])
    with pytest.raises(ConfigError, match=r"cluster\.optimizer\.new: no such field"):
        load_config("cluster", [f"--cluster={file}", "--cluster.optimizer.new=1"])


def test_a_field_that_every_config_has_need_not_be_in_the_file(tmp_path):
    path = tmp_path / "bare.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(): return ConfigDict({'num_steps': 3, 'mesh': {'data': 1}})\n"
    )
    flags = [
        "--config.eval.params=ema",
        "--config.mesh.fsdp=2",
        "--config.sharding.max_replicated_bytes=100",
        "--config.sharding.optimizer_axes=('data',)",
        "--config.num_microbatches=2",
    ]
    config = load_config("config", [f"--config={path}", *flags]).config
    assert config.to_dict() == {
        "num_steps": 3,
        "mesh": {"data": 1, "fsdp": 2},
        "eval": {"params": "ema"},
        "sharding": {"max_replicated_bytes": 100, "optimizer_axes": ("data",)},
        "num_microbatches": 2,
    }
    for wrong, message in [
        ("--config.eval.parms=ema", "did you mean 'params'?"),
        ("--config.mesh.fsdp=two", "config.mesh.fsdp='two': must be an int"),
        ("--config.model.dim=3", "config.model.dim: no such field"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config("config", [f"--config={path}", wrong])
        assert message in str(caught.value)
