"""Decisions taken once and told to all, through the coordination service of `jax.distributed`.

Every process of a gang must come to the same decision at the same step. What one process alone can
know (its clock, its disk) is therefore decided by the lead process and broadcast. On a process
alone all of this is trivially so.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax

from trainer.rollcall import AbsentError

# Keys older than this many calls are deleted, so that a long run does not grow the lead's memory.
# No process can be that far behind: steps are collective.
_KEPT_KEYS = 1000

_calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def fail_together(error: Exception, accuses: Sequence[int]) -> NoReturn:
    """Raise an error that every process has found. Collective: every process must call this.

    Args:
      error: the same on all processes.
      accuses: the processes that are the reason, which the launcher will name.
    """
    error.accuses = tuple(accuses)  # type: ignore[attr-defined]
    if is_lead():
        time.sleep(1.0)  # With the lead goes its service, which aborts whoever still speaks.
    raise error


def is_lead() -> bool:
    """Is this process 0?"""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print on the lead process only."""
    if is_lead():
        print(text, flush=True)


def client() -> Any:
    """The client of the gang's coordination service.

    Raises:
      RuntimeError: this process is in no gang.
    """
    # JAX has no public door to its key-value store (seen in jax 0.10.2); drop this when it has.
    from jax._src import distributed

    found = distributed.global_state.client
    if found is None:
        raise RuntimeError("trainer.distributed.initialize was not called on this process")
    return found


def broadcast(name: str, value: Any, timeout_seconds: float = 300.0) -> Any:
    """Tell all processes what the lead decided. Collective: every process must call this.

    Args:
      name: what is decided; calls of one name must come in the same order on every process.
      value: a JSON value; only the lead's counts.
      timeout_seconds: how long to wait for the lead.

    Returns:
      The lead's value, having been through JSON on every process, the lead's included.

    Raises:
      TimeoutError: the lead did not speak in time.
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(value))
    number = next(_calls[f"broadcast/{name}"])
    return _broadcast(f"muster/broadcast/{name}/{number}", name, value, timeout_seconds)


def _broadcast(key: str, name: str, value: Any, timeout_seconds: float) -> Any:
    if is_lead():
        own = json.dumps(value)
        client().key_value_set(key, own)
        _forget(key)
        return json.loads(own)
    text = _get(key, timeout_seconds)
    if text is None:
        raise AbsentError(
            f"{name!r}: process 0 (the lead) did not answer process {jax.process_index()} within "
            f"{timeout_seconds:g} s; see its log",
            accuses=(0,),
        )
    return json.loads(text)


def gather(name: str, value: Any, timeout_seconds: float = 300.0) -> list[Any]:
    """Collect one JSON value from each process. Collective: every process must call this.

    Returns:
      On every process, the values in the order of process ids.

    Raises:
      TimeoutError: some processes did not speak in time; the text names them.
    """
    return settle(name, value, lambda values: values, timeout_seconds)


def settle(
    name: str, value: Any, judge: Callable[[list[Any]], Any], timeout_seconds: float = 300.0
) -> Any:
    """Collect one JSON value from each process, and tell all what the lead makes of them.

    Collective: every process must call this. Where thousands have much to say, it spares the lead
    from sending all of it to each of them.

    Args:
      name: what is settled; calls of one name must come in the same order on every process.
      value: a JSON value.
      judge: makes a JSON value of all values, in the order of process ids. The lead calls it.
      timeout_seconds: how long to wait for the others.

    Returns:
      On every process, what `judge` returned.

    Raises:
      TimeoutError: some processes did not speak in time; the text names them.
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(judge([json.loads(json.dumps(value))])))
    number = next(_calls[f"gather/{name}"])
    key = f"muster/gather/{name}/{number}"
    answer: dict[str, Any] = {}
    if is_lead():
        deadline = time.monotonic() + timeout_seconds
        texts: list[str | None] = [json.dumps(value)]
        for process in range(1, jax.process_count()):
            # Those that come after a missing one have had their time too.
            texts.append(_get(f"{key}/{process}", max(0.01, deadline - time.monotonic())))
        answer["missing"] = [process for process, text in enumerate(texts) if text is None]
        if not answer["missing"]:
            answer["value"] = judge([json.loads(text) for text in texts if text is not None])
    else:
        client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
        _forget(f"{key}/{jax.process_index()}", place=-2)
    # The lead speaks by its own deadline; the others wait a little longer to hear it.
    answer = _broadcast(f"{key}/all", name, answer, timeout_seconds + 10.0)
    if answer["missing"]:
        listed = ", ".join(map(str, answer["missing"]))
        error = AbsentError(
            f"{name!r}: process(es) {listed} of {jax.process_count()} did not come within "
            f"{timeout_seconds:g} s; see their logs",
            answer["missing"],
        )
        fail_together(error, error.accuses)
    return answer["value"]


def barrier(name: str, timeout_seconds: float = 300.0) -> None:
    """Wait until all processes are here. Collective: every process must call this.

    Raises:
      TimeoutError: some did not come in time; the text names them.
    """
    gather(f"barrier/{name}", None, timeout_seconds)


def _get(key: str, timeout_seconds: float) -> str | None:
    """A key's value, waited for; None when the time is over."""
    try:
        return client().blocking_key_value_get(key, max(1, int(timeout_seconds * 1000)))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def _forget(key: str, place: int = -1) -> None:
    """Delete the key that this one's counter left `_KEPT_KEYS` calls ago."""
    parts = key.split("/")
    if not parts[place].isdigit():  # `.../<number>/all`
        place -= 1
    if int(parts[place]) >= _KEPT_KEYS:
        parts[place] = str(int(parts[place]) - _KEPT_KEYS)
        client().key_value_delete("/".join(parts))
