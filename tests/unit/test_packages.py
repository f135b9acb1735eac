"""A test whose package is missing is skipped, except where nothing may be missing."""

from __future__ import annotations

import pytest

from tests.testing.packages import required_package


def test_a_missing_package_skips_on_a_desk_and_is_an_error_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "")
    with pytest.raises(
        pytest.skip.Exception, match="package no_such_package is missing; pip"
    ) as by:
        required_package("no_such_package")
    assert by.value.allow_module_level
    monkeypatch.setenv("CI", "true")
    with pytest.raises(ImportError, match="no_such_package"):
        required_package("no_such_package")
