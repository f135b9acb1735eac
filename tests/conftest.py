"""Eight CPU devices for the tests that run in this process, chosen before jax starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
