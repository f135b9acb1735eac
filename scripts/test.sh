#!/usr/bin/env bash
# Set everything up in .venv, then check the code and run the tests. Arguments go to pytest:
#
#   scripts/test.sh                 everything (lint, types, all tests)
#   scripts/test.sh tests/unit      the quick part of the tests, after lint and types
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup_env.sh .venv test
scripts/test_packages.sh
.venv/bin/ruff format --check --quiet . || { echo "run: .venv/bin/ruff format ." >&2; exit 1; }
.venv/bin/ruff check --quiet .
.venv/bin/mypy
if [ $# -gt 0 ]; then exec .venv/bin/python -m pytest "$@"; fi
# Several at once: some tests wait, for SLURM or for a limit to be over, while others start gangs.
.venv/bin/python -m pytest -q -n 2 tests/unit
.venv/bin/python -m pytest -q -n 2 tests/transformations
.venv/bin/python -m pytest -q -n 4 --dist worksteal --durations=15 --ignore=tests/unit --ignore=tests/transformations
