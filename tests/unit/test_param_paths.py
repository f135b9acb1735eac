"""trainer.param_paths: regular expressions over parameter paths, as masks and as groups."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from launch.spec import ConfigError
from trainer.param_paths import (
    Groups,
    any_of,
    as_mask,
    check_matches,
    compile_patterns,
    folded,
)

PATHS = ["embedding", "layers.0.mlp.kernel", "layers.0.mlp.bias", "layers.1.mlp.kernel", "norm"]


def groups(*labels, names=None):
    return Groups("f", labels, names or {group for _, group in labels})


def message(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ("norm", {"norm"}),
        (("mlp",), {"layers.0.mlp.kernel", "layers.0.mlp.bias", "layers.1.mlp.kernel"}),
        (("bias$", r"\.1\."), {"layers.0.mlp.bias", "layers.1.mlp.kernel"}),
        (("^mlp",), set()),
        ((), set()),
    ],
)
def test_an_expression_is_searched_for_anywhere_in_a_path(patterns, chosen):
    choice = any_of(compile_patterns("f", patterns))
    assert {path for path in PATHS if choice(path)} == chosen


def test_a_mask_names_params_as_the_trainer_does_in_a_dict_and_in_an_nnx_state():
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0)) for _ in range(2)])

    mask = as_mask(any_of(compile_patterns("f", (r"^layers\.1\.kernel$",))))
    state = nnx.state(Net(), nnx.Param)
    for params in (state, nnx.as_pure(state), nnx.to_pure_dict(state)):
        # In order: the biases and kernels of layers 0 and 1.
        assert jax.tree.leaves(mask(params)) == [False, False, False, True]


@pytest.mark.parametrize("patterns", [3, None, ("a", 3), {"a": 1}])
def test_what_is_no_expression_is_refused(patterns):
    expected = "must be a regular expression over parameter paths, or a tuple of them"
    assert message(compile_patterns, "f", patterns) == f"f={patterns}: {expected}"


def test_a_broken_expression_is_refused_with_the_reason():
    assert "f=('(a',): not a regular expression: missing )" in message(compile_patterns, "f", "(a")


def test_the_first_expression_that_matches_names_the_group():
    found = groups(("bias$", "b"), ("mlp", "m"), (".*", "rest"))
    assert [found.group_of(path) for path in PATHS] == ["rest", "m", "b", "m", "rest"]
    assert found.names == ["b", "m", "rest"]
    tree = {"norm": jnp.ones(2), "layers": {"0": {"mlp": {"bias": jnp.ones(2)}}}}
    assert found(tree) == {"norm": "rest", "layers": {"0": {"mlp": {"bias": "b"}}}}
    found.check(PATHS)


def test_a_parameter_without_a_group_is_refused_by_its_path_before_optax_sees_it():
    lost = groups(("mlp", "m"))
    expected = "f: no group takes embedding, norm; add a pair for them, r'.*' last takes all"
    assert message(lost.check, PATHS) == expected
    assert message(lost, dict.fromkeys(PATHS[::4], 0)) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            [("biass", "b"), (".*", "rest")],
            "f (group 'b'): 'biass' matches no parameter; did you mean 'bias'?",
        ),
        (
            [(".*", "rest"), ("bias", "b")],
            "f: group 'b' gets nothing: all that 'bias' matches is taken by rest before it",
        ),
        (
            [("0.mlp", "m"), ("embed", "e"), ("bias|0.mlp.kernel", "b"), (".*", "rest")],
            "f: group 'b' gets nothing: all that 'bias|0.mlp.kernel' matches is taken by m before",
        ),
    ],
)
def test_a_group_that_gets_nothing_is_refused_with_the_reason(labels, expected):
    assert message(groups(*labels).check, PATHS).startswith(expected)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([("a", "x")], ["y", "z"], "f: group 'x' has no entry in transforms, which has y, z"),
        ([("a", "x")], ["x", "y"], "f: no expression leads to group 'y' of transforms"),
        ([("(", "x")], ["x"], "f[0]=('(',): not a regular expression"),
        ([], ["x"], "f=(): must be pairs (regular expression, group), e.g."),
        (["a"], ["x"], "f=('a',): must be pairs"),
        ([("a", "x", "y")], ["x"], "f=(('a', 'x', 'y'),): must be pairs"),
        ([("a", 3)], ["x"], "f=(('a', 3),): must be pairs"),
    ],
)
def test_labels_and_transforms_must_fit_together(labels, names, expected):
    assert message(Groups, "f", tuple(labels), names).startswith(expected)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("kernal$", "did you mean 'kernel'?"),
        (r"layers\.\d+\.mpl", "did you mean 'layers'?"),
        ("q", "there are embedding, layers.0-1.mlp.kernel, layers.0.mlp.bias, norm"),
    ],
)
def test_an_expression_that_matches_nothing_is_refused_with_a_hint(pattern, hint):
    patterns = compile_patterns("f", ("norm", pattern))
    assert message(check_matches, "f", patterns, PATHS) == (
        f"f: {pattern!r} matches no parameter; {hint}"
    )


def test_a_long_list_of_paths_is_cut():
    paths = [f"{letter}.{kind}" for letter in "abc" for kind in ("kernel", "bias")]
    said = message(check_matches, "f", compile_patterns("f", "q"), paths)
    assert said.endswith("there are a.kernel, a.bias, b.kernel, b.bias and 2 more")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a", "b.c"], ["a", "b.c"]),
        (["l.0.a", "l.0.b", "l.1.a", "l.1.b"], ["l.0-1.a", "l.0-1.b"]),
        ([f"l.{i}" for i in sorted(map(str, range(12)))], ["l.0-11"]),
        (["l.0", "l.2"], ["l.0", "l.2"]),
        (["l.3"], ["l.3"]),
        (["b.0.l.0", "b.0.l.1", "b.1.l.0", "b.1.l.1"], ["b.0-1.l.0-1"]),
        (["b.0.l.0", "b.0.l.1", "b.1.l.0"], ["b.0.l.0", "b.0.l.1", "b.1.l.0"]),
        (["l.1", "l.2", "m.1"], ["l.1-2", "m.1"]),
    ],
)
def test_paths_that_differ_in_numbers_are_folded_where_they_make_whole_ranges(paths, names):
    found = folded(paths)
    assert list(found) == names
    assert sorted(path for members in found.values() for path in members) == sorted(paths)
