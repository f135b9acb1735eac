"""The schedules of configs/schedules.py go through the points that define them."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import digits, lm_bytes, regression, schedules
from launch.spec import ConfigError, load_config, train_spec
from launch.spec.fields import plain
from tests.testing import tiny
from trainer.optimizer import make_optimizer

PEAK = 0.1

# Section, and (step, rate) of a run of 100 steps with 10 of warm-up.
POINTS = {
    "warmup_cosine": (
        schedules.warmup_cosine(PEAK, 100, end=0.02),
        [(0, 0), (5, 0.05), (10, 0.1), (55, 0.06), (100, 0.02), (200, 0.02)],
    ),
    "warmup_stable_decay": (
        schedules.warmup_stable_decay(PEAK, 100, end=0.02),
        [(0, 0), (5, 0.05), (10, 0.1), (80, 0.1), (90, 0.06), (100, 0.02), (200, 0.02)],
    ),
    "warmup_stable_decay, lengths given": (
        schedules.warmup_stable_decay(PEAK, 100, warmup_steps=4, decay_steps=50),
        [(2, 0.05), (4, 0.1), (50, 0.1), (75, 0.05), (100, 0)],
    ),
    "inverse_sqrt": (
        schedules.inverse_sqrt(PEAK, 100),
        [(0, 0), (5, 0.05), (10, 0.1), (40, 0.05), (90, 0.1 / 3), (1000, 0.01)],
    ),
    "one_cycle": (
        schedules.one_cycle(PEAK, 100),
        [(0, 0.004), (15, 0.052), (30, 0.1), (65, 0.05), (100, 4e-7), (200, 4e-7)],
    ),
}


def rate_of(section):
    config = {"chain": ("sgd",), "sgd": {"learning_rate": plain(section)}}
    return make_optimizer(config).learning_rate


@pytest.mark.parametrize("name", POINTS)
def test_a_schedule_goes_through_the_points_that_define_it(name):
    section, points = POINTS[name]
    rate = rate_of(section)
    for step, expected in points:
        assert float(rate(step)) == pytest.approx(expected, abs=1e-6), step


def test_the_steps_before_the_decay_do_not_depend_on_where_the_run_stops():
    short, long = (
        rate_of(schedules.warmup_stable_decay(PEAK, steps, 10, 20)) for steps in (100, 1000)
    )
    assert [float(short(i)) for i in range(80)] == [float(long(i)) for i in range(80)]


@pytest.mark.parametrize("config", [regression, digits])
@pytest.mark.parametrize(
    "variant", ["warmup_cosine", "warmup_stable_decay", "inverse_sqrt", "one_cycle"]
)
def test_a_config_takes_each_schedule_by_its_name(config, variant):
    optimizer = make_optimizer(plain(config.get_config(variant).optimizer))
    steps = np.arange(config.get_config().num_steps)
    rates = np.asarray(jax.vmap(optimizer.learning_rate)(steps))
    assert len(np.unique(rates)) > 20
    assert rates.max() == pytest.approx(rates[: len(rates) // 2].max())
    assert rates[-1] < rates.max() / 2


@pytest.mark.parametrize("name", ["regression", "digits"])
def test_an_unknown_schedule_is_one_line_with_the_closest_one(name):
    with pytest.raises(ConfigError) as caught:
        load_config("config", [f"--config={tiny.ROOT}/configs/{name}.py:one_cycel"])
    expected = "configs/schedules.py has no such schedule; did you mean 'one_cycle'?"
    assert str(caught.value) == f"config='one_cycel': {expected}"


def test_an_inverse_square_root_without_warm_up_is_refused():
    with pytest.raises(ConfigError, match="warmup_steps=0: must be at least 1"):
        rate_of(schedules.inverse_sqrt(PEAK, 100, warmup_steps=0))


@pytest.mark.parametrize("config", [regression, digits, lm_bytes])
def test_a_config_is_complete_for_a_gang_of_eight_devices(config):
    assert train_spec(config.get_config(), 8).mesh.data == 8


def test_reading_the_configs_does_not_import_jax():
    program = (
        "import sys; from configs import digits, regression\n"
        "for name in ('warmup_cosine', 'inverse_sqrt'):\n"
        "    digits.get_config(name), regression.get_config(name)\n"
        "assert 'jax' not in sys.modules and 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tiny.ROOT, timeout=60)
