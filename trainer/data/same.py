"""Do all processes of a gang have the same data?"""

from __future__ import annotations

from typing import Any

from launch.spec import ConfigError
from trainer.agreement import broadcast, fail_together, settle
from trainer.data.identity import Identity, difference

# Some processes may have to index the data once more, where they share no file system.
_TIMEOUT_SECONDS = 1800.0


def check_gang(identity: Identity) -> None:
    """See that all processes have the same data. Collective: every process must call this.

    Raises:
      ConfigError: on every process: who has other data, and in what.
    """
    found = difference(broadcast("data", identity, _TIMEOUT_SECONDS), identity)

    def judge(reports: list[str]) -> Any:
        odd = [process for process, report in enumerate(reports) if report]
        return [odd, reports[odd[0]]] if odd else None

    if verdict := settle("data", found, judge, _TIMEOUT_SECONDS):
        odd, text = verdict
        listed = ", ".join(map(str, odd[:4])) + (" and others" if len(odd) > 4 else "")
        error = ConfigError(
            "config.data",
            f"process {listed} has other data than process 0 ({text}, process 0's first); put the "
            "same files on every host, and let nothing depend on the order of a set, of a "
            "directory or on the host",
        )
        fail_together(error, odd)
