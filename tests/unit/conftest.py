"""Compiled programs are kept."""

from tests.testing import compiled

compiled.keep()
