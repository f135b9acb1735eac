"""Train and resume on the newest interpreter of this machine, with the pins it gets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testing.gangs import MusterCommand

ROOT = Path(__file__).resolve().parents[2]
NEWEST_SUPPORTED = (3, 13)


def newer_interpreter() -> str | None:
    """The newest supported Python here that is newer than this one."""
    candidates = [shutil.which(f"python3.{minor}") for minor in range(NEWEST_SUPPORTED[1], 10, -1)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += [str(path) for path in pyenv.glob("versions/3.*/bin/python3")]
    found = {}
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
        match = re.match(r"Python (\d+)\.(\d+)", done.stdout)
        if match:
            found[int(match[1]), int(match[2])] = candidate
    usable = [v for v in found if sys.version_info[:2] < v <= NEWEST_SUPPORTED]
    return found[max(usable)] if usable else None


@pytest.mark.timeout(900)  # It may have to install JAX first.
def test_train_and_resume_on_the_newest_interpreter(tmp_path):
    interpreter = newer_interpreter()
    if interpreter is None:
        pytest.skip("no Python newer than this one, up to 3.13, is installed")
    venv = ROOT / ".venv-newest"
    subprocess.run(
        [ROOT / "scripts" / "setup_env.sh", venv.name],
        env={**os.environ, "PYTHON": interpreter},
        check=True,
    )
    muster = MusterCommand(tmp_path, python=str(venv / "bin" / "python"))
    config = f"--config={ROOT}/tests/testing/configs/tiny.py:lm"
    for steps, said in ((3, "compiled the training step"), (6, "resumed from step 3")):
        done = muster.run(config, f"--config.num_steps={steps}")
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        assert said in text
    pins = (ROOT / "constraints.txt").read_text()
    version = re.search(r"devices, jax (\S+)", text)
    assert version
    assert f'jax=={version[1]}; python_version >= "3.12"' in pins
    muster.check_nothing_is_left()
