"""trainer.describe: what a config makes of a model, read by people and found by their tools."""

import itertools
import re

import pytest

from launch.spec import ConfigError
from tests.testing import tiny
from trainer.describe import described

CONFIG = f"--config={tiny.ROOT}/tests/testing/configs/tiny.py:lm"
LOCAL = f"--cluster={tiny.ROOT}/configs/cluster/local.py"
PLAIN = ("--config.optimizer={}",)  # Whatever the file has.
SGD = {"chain": ("sgd",), "sgd": {"learning_rate": 0.5}}
ADAMW = {"chain": ("adamw",), "adamw": {"learning_rate": 0.25, "weight_decay": 0.1}}
GROUPS = {
    "param_labels": ((r"norm", "norms"), (r"embedding", "frozen"), (r".*", "kernels")),
    "transforms": {"norms": SGD, "frozen": {"chain": ("set_to_zero",)}, "kernels": ADAMW},
}


def text(*arguments, devices=8):
    given = () if devices is None else (f"--num_devices={devices}",)
    return described(["describe", CONFIG, *given, *arguments])


def rows_in(lines):
    """Parameter -> its row, by heading. Columns begin where their headings do."""
    head, *body = lines[: lines.index("")]
    starts = [match.start() for match in re.finditer(r"\S+", head)] + [None]
    spans = list(itertools.pairwise(starts))
    table = [{head[a:b].strip(): line[a:b].strip() for a, b in spans} for line in body]
    return {row.pop("parameter"): row for row in table}


def described_by(*arguments, **options):
    lines = text(*arguments, **options).splitlines()
    return rows_in(lines), lines[lines.index("") + 1 :]


def optimizer(section):
    return [*PLAIN, *(f"--config.optimizer.{name}={value!r}" for name, value in section.items())]


def test_a_row_says_everything_about_a_parameter_and_layers_alike_share_one():
    rows, rest = described_by("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert rows["embedding_VD"] == {
        "shape": "[256, 32]",
        "dtype": "float32",
        "axes": "vocab, embed",
        "spec": "P('tensor', 'fsdp')",
        "group": "-",
        "decayed": "yes",
        "state": "mu, nu",
    }
    assert list(rows)[:2] == ["embedding_VD", "layers.0-1.attention.key_DKH"]
    assert rows["layers.0-1.attention_norm.scale_D"]["spec"] == "P(None)"
    assert rest[0] == "20 parameters of 26,784 numbers: 26,784 are trained, 26,784 are decayed"
    assert rest[1] == "optimizer state that belongs to no parameter: count, step"
    assert rest[2].startswith("learning rate, by updates done: 0.01 at 0, 0.01 at ")
    assert rest[3].startswith("state on mesh data=2 fsdp=2 tensor=2: ")


def test_without_folding_every_parameter_has_a_row():
    rows, _ = described_by("--nofold")
    assert len(rows) == 20
    assert {"layers.0.mlp.up_DF", "layers.1.mlp.up_DF"} <= set(rows)
    assert rows["layers.0.mlp.up_DF"] == rows["layers.1.mlp.up_DF"]


def test_layers_that_are_not_alike_have_rows_of_their_own():
    rows, _ = described_by(r"--config.optimizer.adamw.mask=(r'layers\.0.*DF$',)")
    assert rows["layers.0.mlp.up_DF"]["decayed"] == "yes"
    assert rows["layers.1.mlp.up_DF"]["decayed"] == "no"


def test_groups_frozen_parameters_and_rates_are_told():
    rows, rest = described_by(*optimizer({"chain": ("partition",), "partition": GROUPS}))
    told = {name: (row["group"], row["decayed"], row["state"]) for name, row in rows.items()}
    assert told["embedding_VD"] == ("frozen (frozen)", "no", "-")
    assert told["norm.scale_D"] == ("norms", "no", "-")
    assert told["layers.0-1.mlp.up_DF"] == ("kernels", "yes", "mu, nu")
    assert rest[0] == "20 parameters of 26,784 numbers: 18,592 are trained, 18,432 are decayed"
    assert [line.split(" at ")[0] for line in rest if line.startswith("learning rate")] == [
        "learning rate of norms, by updates done: 0.5",
        "learning rate of kernels, by updates done: 0.25",
    ]


def test_no_decay_and_masks_are_told():
    rows, rest = described_by("--config.optimizer.no_decay=('norm', 'embedding')")
    not_decayed = {name for name, row in rows.items() if row["decayed"] == "no"}
    assert not_decayed == {
        "embedding_VD",
        "layers.0-1.attention_norm.scale_D",
        "layers.0-1.mlp_norm.scale_D",
        "norm.scale_D",
    }
    assert rest[0].endswith("26,784 are trained, 18,432 are decayed")


def test_an_expression_of_no_decay_that_matches_nothing_is_remarked_on_when_others_do():
    _, rest = described_by("--config.optimizer.no_decay=('norm', 'bias')")
    assert "note: config.optimizer.no_decay: 'bias' matches no parameter" in rest


def test_muon_decays_matrices_and_its_adam_the_rest():
    muon = {"learning_rate": 0.1, "weight_decay": 0.1}
    adam = {**muon, "weight_decay": 0.0, "adam_weight_decay": 0.1}
    for arguments, matrix, vector in [(muon, "yes", "no"), (adam, "no", "yes")]:
        rows, _ = described_by(*optimizer({"chain": ("muon",), "muon": arguments}))
        assert rows["embedding_VD"]["decayed"] == matrix
        assert rows["norm.scale_D"]["decayed"] == vector


def test_state_of_another_shape_dtype_or_layout_is_told_with_it():
    adafactor = {"learning_rate": 0.1, "min_dim_size_to_factor": 4, "momentum": 0.9}
    adafactor["dtype_momentum"] = "bfloat16"
    rows, _ = described_by(
        "--config.mesh.fsdp=2", *optimizer({"chain": ("adafactor",), "adafactor": adafactor})
    )
    assert rows["embedding_VD"]["state"] == (
        "v [1] P(); v_col [256] P(('tensor', 'fsdp')); v_row [32] P('fsdp'); ema bfloat16"
    )


def test_moments_split_over_data_as_well_are_told_and_counted():
    rows, rest = described_by(
        "--config.sharding.optimizer_axes=('data',)",
        "--config.mesh.fsdp=2",
        "--config.optimizer.ema_decay=0.9",
    )
    assert rows["layers.0-1.mlp.up_DF"]["spec"] == "P('fsdp', 'tensor')"
    assert rows["layers.0-1.mlp.up_DF"]["state"] == "average, mu, nu P('fsdp', ('tensor', 'data'))"
    assert any(line.endswith("the params, and splits the optimizer's state") for line in rest)


@pytest.mark.parametrize(
    ("arguments", "devices", "mesh"),
    [
        ([], 8, "data=8 fsdp=1 tensor=1"),
        ([], None, "data=1 fsdp=1 tensor=1"),
        (["--config.mesh.fsdp=4", "--config.mesh.tensor=2"], None, "data=1 fsdp=4 tensor=2"),
        (["--config.mesh.fsdp=2"], 2048, "data=1024 fsdp=2 tensor=1"),
        ([LOCAL], None, "data=8 fsdp=1 tensor=1"),
        ([LOCAL, "--cluster.processes_per_host=3"], None, "data=12 fsdp=1 tensor=1"),
        ([LOCAL], 4, "data=4 fsdp=1 tensor=1"),
    ],
)
def test_it_lays_out_for_devices_that_are_not_there(arguments, devices, mesh):
    said = text(*arguments, "--config.global_batch_size=6144", devices=devices)
    assert f"state on mesh {mesh}: " in said


def test_a_decay_that_ends_long_before_the_run_is_warned_of():
    cosine = {"init_value": 0.1, "decay_steps": 100}
    section = {"chain": ("sgd",), "sgd": {"learning_rate": {"cosine_decay_schedule": cosine}}}
    said = text(*optimizer(section), "--config.num_steps=1000")
    assert said.splitlines()[-1] == (
        "warning: config.optimizer.sgd.learning_rate has decayed by step 100, and stays at 0 until "
        "num_steps=1000"
    )
    assert "warning" not in text(*optimizer(section), "--config.num_steps=100")


def test_help_says_what_the_flags_are():
    said = described(["describe", "--help"])
    assert "--num_devices=N" in said
    assert "--nofold" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_device=8"], "unknown flag --num_device; did you mean 'num_devices'?"),
        (["--num_devices=many"], "flag --num_devices=many: invalid literal"),
        (["--num_devices=0"], "flag --num_devices=0: "),
        (["more"], "unexpected argument 'more'"),
        (["--cluster=/no/such.py"], "cluster='/no/such.py': no such file"),
        (["--config.mesh.fsdp=3", "--num_devices=8"], "config.mesh.data=-1: nothing fits: fsdp=3"),
        (["--num_devices=3"], "config.global_batch_size=16: must be a multiple of 3"),
        (["--config.mesh.tensor=64"], "config.mesh: tensor = 64 does not divide dim "),
        (["--config.optimizer.adamw.b3=1"], "config.optimizer.adamw.b3: no such argument"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(ConfigError) as caught:
        text(*arguments, devices=None)
    said = str(caught.value)
    assert said.startswith(message)
    assert "\n" not in said


def test_a_missing_config_names_those_there_are_and_a_missing_file_the_closest():
    with pytest.raises(ConfigError) as caught:
        described(["describe"])
    assert str(caught.value).startswith("--config is missing; give --config=FILE; there are ")
    assert "lm_bytes.py" in str(caught.value)
    assert "schedules.py" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*configs/digits\.py\?"):
        described(["describe", "--config=configs/digit.py"])
