"""What `muster certify` needs inside of a training: faults at chosen places, and records."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from launch import contract

if TYPE_CHECKING:
    from trainer.certify.probe import Probe


def asked_for() -> Probe | None:
    """The probe of this process; None, and nothing imported, unless `muster certify` runs it."""
    path = os.environ.get(contract.CERTIFY_PLAN)
    if not path:
        return None
    from trainer.certify.probe import make_probe

    return make_probe(path)
