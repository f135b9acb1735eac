#!/usr/bin/env bash
# Set everything up in .venv, then train a byte-level language model on the source of Python's own
# standard library: 2 processes of 4 CPU devices in one gang, three to four minutes on two cores.
# Run it again and it resumes; further arguments go to `muster run`, e.g. --config.num_steps=2000.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup_env.sh .venv
exec .venv/bin/muster run --config=configs/lm_bytes.py --cluster=configs/cluster/local.py \
  --workdir=runs/quickstart "$@"
