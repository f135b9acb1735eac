"""Config files, overrides, and every way to get them wrong."""

from __future__ import annotations

import pytest

from launch.spec import ConfigError, compare_configs, load_config

CONFIG = """
from ml_collections import config_dict

def get_config(size="small"):
    config = config_dict.ConfigDict()
    config.num_steps = 5
    config.rate = 0.5
    config.verbose = False
    config.shape = (1, 2)
    config.name = "a"
    config.limit = config_dict.placeholder(int)
    config.nothing = None
    config.model = config_dict.ConfigDict({"num_layers": 2, "size": size})
    config.decay_steps = config.get_ref("num_steps")
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def test_overrides_of_every_type_are_applied_and_the_rest_is_handed_back(file):
    loaded = load_config(
        "config",
        [
            "before",
            f"--config={file}:large",
            "--config.num_steps=7",
            "--config.rate",
            "1",
            "--config.verbose",
            "--config.shape=(3,4)",
            "--config.name=",
            "--config.limit=9",
            "--config.model.num_layers=3",
            "--other=x",
            "--",
            "--config.rate=2",
        ],
    )
    config = loaded.config
    assert (config.num_steps, config.decay_steps, config.rate) == (7, 7, 1.0)
    assert (config.verbose, config.shape, config.name, config.limit) == (True, (3, 4), "", 9)
    assert config.model.to_dict() == {"num_layers": 3, "size": "large"}
    assert loaded.rest == ["before", "--other=x", "--", "--config.rate=2"]
    assert loaded.source == f"{file}:large"
    assert loaded.overrides[1:3] == ["--config.rate=1", "--config.verbose=true"]


def test_the_overrides_handed_back_give_the_same_config_again(file):
    arguments = [f"--config={file}", "--noconfig.verbose", "--config.shape=5", "--config.shape=6"]
    first = load_config("config", arguments)
    again = load_config("config", [f"--config={first.source}", *first.overrides])
    assert first.config.to_dict() == again.config.to_dict()
    assert first.config.shape == (5, 6)


def test_an_edit_within_the_same_second_is_seen(file):
    load_config("config", [f"--config={file}"])
    file.write_text(CONFIG.replace("num_steps = 5", "num_steps = 6"))
    assert load_config("config", [f"--config={file}"]).config.num_steps == 6


BAD_ARGUMENTS = {
    "no flag": ([], "--config is missing; give --config=FILE"),
    "no value": (["--config"], "--config needs a value; give --config=FILE"),
    "no file": (["--config=DIR/smal.py"], "config='DIR/smal.py': no such file; did you mean"),
    "a directory": (["--config=DIR"], "config='DIR': cannot be read: Is a directory"),
    "override alone": (["--config.rate=1"], "--config.rate=1: there is no --config=FILE"),
    "unknown key": (["FILE", "--config.num_step=1"], "config.num_step: no such field; did you"),
    "unknown section": (["FILE", "--config.modle.x=1"], "config.modle.x: no such field; did you"),
    "key of a number": (["FILE", "--config.rate.x=1"], "config.rate.x: no such field; config.rate"),
    "int as 1e3": (["FILE", "--config.num_steps=1e3"], "config.num_steps='1e3': must be an int; "),
    "int as word": (["FILE", "--config.limit=many"], "config.limit='many': must be an int"),
    "float": (["FILE", "--config.rate=fast"], "config.rate='fast': must be a number"),
    "bool": (["FILE", "--config.verbose=7"], "config.verbose='7': must be true or false"),
    "section": (["FILE", "--config.model=7"], "config.model='7': must be ConfigDict"),
    "None": (["FILE", "--config.nothing=7"], "config.nothing: is None in the file, so its type"),
    "no value for a field": (["FILE", "--config.rate"], "config.rate: needs a value; write"),
    "no of a number": (["FILE", "--noconfig.rate"], "config.rate: --noconfig.rate: only a bool"),
    "undone": (
        ["FILE", "--config.model.num_layers=1", "--config.model={'num_layers': 2}"],
        "config.model: would undo --config.model.num_layers=1",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_that_says_what_to_do(file, name):
    arguments, message = BAD_ARGUMENTS[name]
    folder = str(file.parent)
    arguments = [
        arg.replace("DIR", folder).replace("FILE", f"--config={file}") for arg in arguments
    ]
    with pytest.raises(ConfigError) as caught:
        load_config("config", arguments)
    assert str(caught.value).startswith(message.replace("DIR", folder))
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "syntax": ("def get_config(:\n  pass", "bad.py:1: syntax error"),
    "import": ("\nimport no_such_thing", "bad.py:2: ModuleNotFoundError: No module named"),
    "error": ("def get_config():\n  return 1 / 0", "bad.py:2: ZeroDivisionError: division"),
    "no function": ("x = 1", "defines no function get_config()"),
    "no config": ("def get_config():\n  return 3", "must return a ConfigDict, not int"),
    "not text": (b"\xff\xfe", "cannot be read: "),
    "open required": (
        "from ml_collections import config_dict\n"
        "def get_config():\n"
        "  return config_dict.ConfigDict({'a': config_dict.required_placeholder(int)})",
        "a required_placeholder is open",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gives_one_line_that_names_the_place(tmp_path, name):
    text, message = BAD_FILES[name]
    path = tmp_path / "bad.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config("config", [f"--config={path}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_differences_in_speed_or_length_are_allowed_and_others_are_not():
    old = {
        "num_steps": 10,
        "log_every_steps": 1,
        "mesh": {"data": -1},
        "data": {"path": "a", "prefetch": 2, "read_threads": 1},
        "checkpoint": {"keep_last": 2},
        "optimizer": {"chain": ["adamw"], "adamw": {"learning_rate": 0.1}},
        "same": (1, 2),
    }
    new = {
        "num_steps": 20,
        "log_every_steps": 2,
        "mesh": {"data": 2, "fsdp": 4},
        "data": {"path": "b", "prefetch": 3, "read_threads": 2},
        "checkpoint": {},
        "optimizer": {"chain": ("adamw",), "adamw": {"learning_rate": 0.2}},
        "same": [1, 2],
        "seed": 1,
    }
    found = {item.field: (item.old, item.new, item.harmless) for item in compare_configs(old, new)}
    assert found.pop("config.data.path") == ("a", "b", False)
    assert found.pop("config.optimizer.adamw.learning_rate") == (0.1, 0.2, False)
    assert found.pop("config.seed") == ("(absent)", 1, False)
    assert found.pop("config.mesh.fsdp") == ("(absent)", 4, True)
    assert all(harmless for _, _, harmless in found.values())
    assert "config.num_steps" in found
    assert "config.same" not in found
    assert "config.optimizer.chain" not in found


def test_weights_of_a_mixture_and_what_is_in_it_may_change_and_a_sources_data_may_not():
    def changed(old, new):
        found = compare_configs({"data": {"mixture": old}}, {"data": {"mixture": new}})
        return {item.field.removeprefix("config.data.mixture."): item.harmless for item in found}

    web, books = {"path": "w", "weight": 0.7}, {"path": "b", "weight": 0.3}
    both = {"web": web, "books": books}
    assert changed(both, {**both, "web": {**web, "weight": 0.5}}) == {"web.weight": True}
    assert changed({"web": web}, both) == {"books.path": True, "books.weight": True}
    assert changed(both, {"books": books}) == {"web.path": True, "web.weight": True}
    assert changed(both, {**both, "web": {**web, "path": "x"}}) == {"web.path": False}
    assert changed(both, {**both, "web": {**web, "keep": "a:b"}}) == {"web.keep": False}
    # How many of each source were read is known only of a mixture.
    assert changed({}, both) == dict.fromkeys(changed({}, both), False)
    assert changed(both, {}) == dict.fromkeys(changed(both, {}), False)


def test_what_follows_two_dashes_is_the_programs_own():
    argv = ["--", "python", "x.py", "--config.a=1", "--config=y.py"]
    loaded = load_config("config", argv, required=False)
    assert loaded.config is None
    assert loaded.rest == argv
