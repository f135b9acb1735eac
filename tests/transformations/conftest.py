"""What these tests compile is kept from one run to the next: it is nearly all of their time."""

import os

import jax

jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/muster/tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
