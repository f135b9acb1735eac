#!/usr/bin/env bash
# Make a virtual environment with Muster and its pinned dependencies; does nothing when it is
# already up to date.
#
#   scripts/setup_env.sh [VENV_DIR [EXTRAS]]      e.g. scripts/setup_env.sh .venv test
#
# PYTHON names the interpreter (3.11 to 3.13); by default the first of python3, python3.13,
# python3.12, python3.11 that is one.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
extras=${2:-}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if [ -x "$venv/bin/python" ]; then
  python="$venv/bin/python"
else
  python=
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if supported "$candidate"; then python=$candidate; break; fi
  done
  if [ -z "$python" ]; then
    echo "error: no Python 3.11 to 3.13 found (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11}); set PYTHON=/path/to/python3" >&2
    exit 2
  fi
  echo "making $venv with $("$python" --version) ..." >&2
  "$python" -m venv "$venv"
fi

# One stamp per set of extras: what was installed, from which pins.
stamp="$venv/.muster-installed-${extras:-base}"
wanted=$(cat setup.py constraints.txt | cksum; "$venv/bin/python" --version; pwd)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  echo "installing Muster${extras:+ with extra '$extras'} into $venv (about a minute) ..." >&2
  # compat: a plain .pth entry; the newer import hook costs every start of Python some time.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --config-settings editable_mode=compat \
    --editable ".${extras:+[$extras]}"
  printf '%s' "$wanted" > "$stamp"
fi
