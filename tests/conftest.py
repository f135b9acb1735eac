"""Eight CPU devices for the tests of this process; set before anything imports jax."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
