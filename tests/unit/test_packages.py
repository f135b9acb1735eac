"""A test whose package is missing is skipped, except where nothing may be missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.testing.gang import ROOT

MODULE = """
from tests.testing.packages import required_package

required_package("no_such_package")

def test_that_needs_it():
    assert False
"""


@pytest.mark.parametrize(("ci", "code", "words"), [("", 5, "1 skipped"), ("true", 2, "1 error")])
def test_a_missing_package_skips_on_a_desk_and_fails_in_ci(tmp_path, monkeypatch, ci, code, words):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "test_it.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout
    assert words in done.stdout
    assert "no_such_package" in done.stdout
