"""The code of docs/pytorch.md and docs/optimizer.md is run: Python in order, configs built."""

from __future__ import annotations

import ast
import operator
import re
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from launch.spec import load_config, train_spec
from tests.testing.configs.tiny import get_config
from trainer.models.transformer_config import TransformerConfig
from trainer.optimizer import check_update, make_optimizer
from trainer.param_paths import param_path

DOCS = Path(__file__).resolve().parents[2] / "docs"
CONFIG_MARK = "# config\n"

# What a config's expressions are matched with.
PARAMS = {
    "embedding": jax.ShapeDtypeStruct((16, 8), jnp.float32),
    "layers": {
        "0": {
            "up": {
                "kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32),
                "bias": jax.ShapeDtypeStruct((16,), jnp.float32),
            },
            "norm": {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)},
        }
    },
    "down": {
        "kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
    },
}


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line of the page, source) of every ```python block."""
    return [
        (text[: found.start(1)].count("\n"), found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def indented_blocks(text: str) -> list[str]:
    """The blocks that are marked by four spaces."""
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def column(text: str, number: int) -> list[str]:
    """The code spans of one column of every table that has a Muster column."""
    tables = re.findall(r"^\| PyTorch .*\| Muster config \|\n\| --- .*\n((?:\|.*\n)+)", text, re.M)
    rows = [re.split(r" \| ?", row.strip("| ")) for table in tables for row in table.splitlines()]
    return [
        code for row in rows if len(row) > number for code in re.findall(r"`(.+?)`", row[number])
    ]


def run(source: str, name: str, names: dict[str, Any], line: int = 0) -> None:
    """Run source text; a traceback shows its line on the page."""
    exec(compile("\n" * line + source, name, "exec"), names)


def trace(expressions: list[str], names: dict[str, Any]) -> None:
    """Evaluate expressions on a model of this trace's own."""
    model = names["MyModel"](nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    names = {**names, "model": model, "optimizer": optimizer}
    for expression in expressions:
        run(expression, f"pytorch.md: {expression}", names)


def set_by(source: str, config: ConfigDict) -> None:
    """Run a block of a config; what another chain needed before is no part of a new one."""
    run(source, "config", {"config": config})
    if "config.optimizer.chain" in source:
        for name in set(config.optimizer) - {"chain", *config.optimizer.chain}:
            if f"config.optimizer.{name} " not in source:
                del config.optimizer[name]


def build(config: ConfigDict) -> None:
    """Build all that a config describes, and trace an update."""
    spec = train_spec(config)
    TransformerConfig(**spec.model)
    made = make_optimizer(spec.optimizer)
    made.facts.check({param_path(p): x.ndim for p, x in jax.tree.leaves_with_path(PARAMS)})
    check_update(made.tx, PARAMS)


def open_config() -> ConfigDict:
    """A language model's config in which a page may put a schedule in a number's place."""
    config = ConfigDict(get_config("lm").to_dict(), type_safe=False)
    config.optimizer = {"chain": ("clip_by_global_norm", "adamw")}
    config.optimizer.clip_by_global_norm = {"max_norm": 1.0}
    config.optimizer.adamw = {"learning_rate": 1e-3}
    return config


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "pytorch.md").read_text()


def test_every_block_and_expression_of_the_pytorch_page_runs(page):
    names: dict[str, Any] = {}
    blocks = [block for block in python_blocks(page) if not block[1].startswith(CONFIG_MARK)]
    assert len(blocks) > 6
    run(blocks[0][1], "pytorch.md", names, blocks[0][0])
    expressions = column(page, 1)
    assert len(expressions) > 30
    nnx.eval_shape(lambda: trace(expressions, names))  # To compile each by itself takes seconds.
    for line, source in blocks[1:]:
        run(source, "pytorch.md", names, line)


def test_every_config_of_the_pytorch_page_builds(page):
    blocks = [source for _, source in python_blocks(page) if source.startswith(CONFIG_MARK)]
    assert len(blocks) == 2
    statements = [code for code in column(page, 2) if code.startswith("config.")]
    assert len(statements) > 20
    for source in [*blocks, *statements]:
        config = open_config()
        set_by(source, config)
        build(config)


def test_every_config_of_the_optimizer_page_builds():
    config = open_config()
    blocks = indented_blocks((DOCS / "optimizer.md").read_text())
    statements = [block for block in blocks if block.startswith("config.")]
    assert len(statements) >= 4
    for source in statements:
        set_by(source, config)
        build(config)


def test_every_flag_of_the_optimizer_page_is_taken(tmp_path):
    blocks = indented_blocks((DOCS / "optimizer.md").read_text())
    chain = next(block for block in blocks if block.startswith("config.optimizer.chain"))
    lines = [line.split()[0] for block in blocks for line in block.splitlines() if line]
    overrides = [line for line in lines if line.startswith("--config.")]
    assert len(overrides) >= 2
    file = tmp_path / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "from tests.testing.configs.tiny import get_config as tiny\n\n\n"
        "def get_config():\n"
        "    config = tiny()\n"
        "    config.optimizer = ConfigDict()\n"
        f"{textwrap.indent(chain, '    ')}    return config\n"
    )
    for override in overrides:
        config = load_config("config", [f"--config={file}", override]).config
        field, value = override.removeprefix("--config.").split("=")
        assert operator.attrgetter(field)(config) == ast.literal_eval(value)
        if value != "None":  # A section taken out of a chain that still has it is an error.
            build(config)
