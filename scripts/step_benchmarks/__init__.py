"""The parts of scripts/bench_step.py, which alone imports them."""
