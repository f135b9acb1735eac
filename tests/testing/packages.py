"""Packages that only some tests need."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def required_package(name: str) -> ModuleType:
    """Import a package of the test extra; without it, the test module is skipped.

    Call it at a test module's top, before that module imports the package.

    Raises:
      ImportError: it is missing under continuous integration (`CI=true`), where nothing may be.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(
            f"the package {name} is missing; pip install -e '.[test]' -c constraints.txt",
            allow_module_level=True,
        )


def missing(what: str) -> None:
    """Skip a test for want of something on this machine; under continuous integration, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} are missing, and nothing may be in continuous integration")
    pytest.skip(f"{what} are missing")
