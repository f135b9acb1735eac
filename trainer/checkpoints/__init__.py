"""Checkpoints at rest: listed, verified, deleted, copied and exported without any jax."""
