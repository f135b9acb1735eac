"""trainer.schedules: schedules by Optax's names, and refusals of those that mean nothing."""

import jax.numpy as jnp
import optax
import pytest

from launch.spec import ConfigError
from trainer.schedules import make_schedule, remarks

WARMUP_COSINE = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 10, "decay_steps": 100}
UP = {"init_value": 0.0, "end_value": 1.0, "transition_steps": 10}
DOWN = {"init_value": 1.0, "end_value": 0.0, "transition_steps": 20}


def joined(**changes):
    section = {
        "schedules": ("linear_schedule@up", "constant_schedule", "linear_schedule@down"),
        "linear_schedule@up": UP,
        "constant_schedule": {"value": 1.0},
        "linear_schedule@down": DOWN,
        "boundaries": (10, 80),
    }
    return {"join_schedules": {**section, **changes}}


def own(peak, at=3):
    """Somebody's own schedule."""
    return lambda count: jnp.where(count == at, peak, 0.0)


def broken():
    raise RuntimeError("broken\nin two lines")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"warmup_cosine_decay_schedule": WARMUP_COSINE},
            optax.warmup_cosine_decay_schedule(**WARMUP_COSINE),
        ),
        (
            joined(),
            optax.join_schedules(
                [
                    optax.linear_schedule(**UP),
                    optax.constant_schedule(1.0),
                    optax.linear_schedule(**DOWN),
                ],
                [10, 80],
            ),
        ),
        (
            # A config's keys are text.
            {
                "piecewise_constant_schedule": {
                    "init_value": 1.0,
                    "boundaries_and_scales": {"30": 0.1, "60": 0.5},
                }
            },
            optax.piecewise_constant_schedule(1.0, {30: 0.1, 60: 0.5}),
        ),
        (
            {"sgdr_schedule": {"cosine_kwargs": (WARMUP_COSINE, WARMUP_COSINE)}},
            optax.sgdr_schedule([WARMUP_COSINE, WARMUP_COSINE]),
        ),
        ({"mine": {"function": f"{__name__}:own", "peak": 5.0, "at": 10}}, own(5.0, 10)),
    ],
)
def test_a_section_is_the_schedule_that_optax_would_make(section, expected):
    made = make_schedule("f", section)
    for step in (0, 5, 10, 11, 29, 30, 31, 79, 80, 85, 99, 100, 150):
        assert float(made(step)) == float(expected(step))


STEPS = "f.warmup_cosine_decay_schedule"
JOIN = "f.join_schedules"


def warmup_cosine(**changes):
    return {"warmup_cosine_decay_schedule": {**WARMUP_COSINE, **changes}}


def linear(**changes):
    return {"linear_schedule": {**UP, **changes}}


MISTAKES = {
    "no entry": ({}, "f: must have one entry, a schedule's name with its arguments; has none"),
    "two entries": (
        {"constant_schedule": {"value": 1}, "linear_schedule": UP},
        "f: must have one entry, a schedule's name with its arguments; has constant_schedule, lin",
    ),
    "unknown": (
        {"cosine_decay": {}},
        "f.cosine_decay: Optax has no such schedule; did you mean 'cosine_decay_schedule'?",
    ),
    "nothing like it": ({"q": {}}, "f.q: Optax has no such schedule; known: "),
    "argument": (
        {"constant_schedule": {"valeu": 1}},
        "f.constant_schedule.valeu: no such argument; did you mean 'value'? constant_schedule t",
    ),
    "missing": ({"constant_schedule": {}}, "f.constant_schedule.value: missing, and it has no"),
    "no section": ({"constant_schedule": 3}, "f.constant_schedule=3: must be a section with the"),
    "text": (linear(init_value="a"), "f.linear_schedule.init_value='a': must be a number"),
    "text steps": (
        linear(transition_steps="ten"),
        "f.linear_schedule.transition_steps='ten': must be a number",
    ),
    "decay within warm-up": (
        warmup_cosine(decay_steps=10),
        f"{STEPS}.decay_steps=10: must be more than warmup_steps=10: it counts the warm-up too; us",
    ),
    "no steps": (linear(transition_steps=0), "f.linear_schedule.transition_steps=0: must be at l"),
    "negative steps": (
        linear(transition_begin=-1),
        "f.linear_schedule.transition_begin=-1: must be at least 0",
    ),
    "negative warm-up": (warmup_cosine(warmup_steps=-1), f"{STEPS}.warmup_steps=-1: must be at le"),
    "no decay": (
        {"cosine_decay_schedule": {"init_value": 1.0, "decay_steps": 0}},
        "f.cosine_decay_schedule.decay_steps=0: must be at least 1: nothing would move",
    ),
    "share": (
        {
            "cosine_onecycle_schedule": {
                "transition_steps": 10,
                "peak_value": 1.0,
                "pct_start": 30,
            }
        },
        "f.cosine_onecycle_schedule.pct_start=30: a share of the steps, must be in (0, 1]",
    ),
    "keys that are no steps": (
        {
            "piecewise_constant_schedule": {
                "init_value": 1.0,
                "boundaries_and_scales": {"soon": 0.1},
            }
        },
        "f.piecewise_constant_schedule.boundaries_and_scales={'soon': 0.1}: its keys must be steps",
    ),
    "what optax refuses": (
        {
            "piecewise_interpolate_schedule": {
                "interpolate_type": "linea",
                "init_value": 1.0,
                "boundaries_and_scales": {"3": 0.1},
            }
        },
        "f.piecewise_interpolate_schedule: Optax refuses it: ValueError: `interpolate_type` must",
    ),
    "too few boundaries": (
        joined(boundaries=(10,)),
        f"{JOIN}.boundaries=(10,): must be a tuple of 2 step(s), where each of the 3 schedules b",
    ),
    "text boundaries": (joined(boundaries=(10, "x")), f"{JOIN}.boundaries=(10, 'x'): must be a tu"),
    "no boundaries": (joined(boundaries=()), f"{JOIN}.boundaries=(): must be a tuple of 2 step(s)"),
    "falling": (joined(boundaries=(80, 10)), f"{JOIN}.boundaries=(80, 10): must grow, from above"),
    "at zero": (joined(boundaries=(0, 10)), f"{JOIN}.boundaries=(0, 10): must grow, from above 0"),
    "too long for its part": (
        joined(boundaries=(9, 80)),
        f"{JOIN}.linear_schedule@up: takes 10 steps, but its part is over after 9 (boundaries)",
    ),
    "too long with its beginning": (
        joined(**{"linear_schedule@up": {**UP, "transition_begin": 1}}),
        f"{JOIN}.linear_schedule@up: takes 11 steps, but its part is over after 10 (boundaries)",
    ),
    "same name twice": (
        joined(schedules=("constant_schedule",) * 3),
        f"{JOIN}.schedules=('constant_schedule', 'constant_schedule', 'constant_schedule'): 'con",
    ),
    "no schedules": (joined(schedules=()), f"{JOIN}.schedules=(): must be a tuple of names"),
    "unknown within": (
        joined(schedules=("linear_schedul", "constant_schedule", "linear_schedule@down")),
        f"{JOIN}.linear_schedul: Optax has no such schedule; did you mean 'linear_schedule'?",
    ),
    "section of no schedule": (
        joined(linear_schedule=UP),
        f"{JOIN}.linear_schedule: no such argument; did you mean 'schedules'? join_sch",
    ),
    "own, no module": (
        {"mine": {"function": "no_such_module:f"}},
        "f.mine.function='no_such_module:f': no module 'no_such_module'; is it on PYTHONPATH?",
    ),
    "own, no function": (
        {"mine": {"function": f"{__name__}:onw"}},
        f"f.mine.function='{__name__}:onw': {__name__} has no function 'onw'; did you mean 'own'?",
    ),
    "own, argument": (
        {"mine": {"function": f"{__name__}:own", "peek": 1.0}},
        "f.mine.peek: no such argument; did you mean 'peak'? own takes peak, at",
    ),
    "own, broken": (
        {"mine": {"function": f"{__name__}:broken"}},
        "f.mine: Optax refuses it: RuntimeError: broken in two lines",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_field(name):
    section, expected = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        make_schedule("f", section)
    said = str(caught.value)
    assert said.startswith(expected)
    assert "\n" not in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("section", "num_steps", "expected"),
    [
        (warmup_cosine(), 100, None),
        (warmup_cosine(), 95, None),
        (warmup_cosine(), 105, None),
        (
            warmup_cosine(),
            200,
            "has decayed by step 100, and stays at 0 until num_steps=200",
        ),
        (warmup_cosine(end_value=0.1), 60, "decays until step 100, but is cut at num_steps=60, at"),
        (joined(), 150, "has decayed by step 100, and stays at 0 until num_steps=150"),
        ({"constant_schedule": {"value": 1.0}}, 100, None),
        ({"linear_schedule": UP}, 100, None),  # A warm-up.
        (
            {
                "exponential_decay": {
                    "init_value": 1.0,
                    "transition_steps": 10,
                    "decay_rate": 0.5,
                    "staircase": True,
                    "end_value": 0.1,
                }
            },
            200,
            None,
        ),
    ],
)
def test_a_decay_that_ends_far_from_the_run_is_remarked_with_the_numbers(
    section, num_steps, expected
):
    lines = remarks([("f", make_schedule("f", section))], num_steps)
    if expected is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(f"warning: f {expected}")
