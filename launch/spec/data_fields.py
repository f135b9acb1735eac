"""Which fields of a config's data may change while a run goes on, and it stays the same run.

The weights of a mixture (`data.mixture.NAME.weight`), and what is in it: the checkpoint's data
position knows how far each source was read, and from the step of the resume on the new weights
hold. A source's other fields say what its examples are, and stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MIXTURE = "mixture"
_FIELD = re.compile(rf"data\.{MIXTURE}\.(?P<name>[^.]+)\.(?P<rest>.+)")


def free_data_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> frozenset[str]:
    """The fields in which two configs may differ since the data goes on by position.

    Args:
      old, new: fields by dotted names, as `launch.spec.flatten` gives them.
    """
    matches = [match for field in {*old, *new} if (match := _FIELD.fullmatch(field))]
    before, now = _names(old), _names(new)
    if not (before and now):  # What was no mixture has no position in each source.
        return frozenset()
    both = before & now
    return frozenset(
        match.string for match in matches if match["name"] not in both or match["rest"] == "weight"
    )


def _names(fields: Mapping[str, Any]) -> set[str]:
    return {match["name"] for field in fields if (match := _FIELD.fullmatch(field))}
