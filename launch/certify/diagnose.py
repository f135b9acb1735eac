"""What a first difference points to. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any

from launch.certify.compare import LEARNING_RATE, METRIC, MISSING, ROWS, STATE, Difference
from launch.certify.records import INITIAL, RESTORED, Records

# Causes.
DATA_POSITION = "data_position"
DATA_RANDOM = "data_random"
DATA_ORDER = "data_order"
DATA_TIME = "data_time"
RNG = "rng"
OPTIMIZER = "optimizer"
BATCH_STATISTICS = "batch_statistics"
NONDETERMINISTIC = "nondeterministic_op"
INITIALIZATION = "initialization"
CHECKPOINT = "checkpoint"
HIDDEN_STATE = "hidden_state"
SCHEDULE = "schedule"
INCOMPLETE = "incomplete"

# What two runs without any interruption show.
INTERRUPTION_FREE = (DATA_ORDER, DATA_TIME, NONDETERMINISTIC, INITIALIZATION)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a difference points to.

    Attributes:
      cause: one of those above.
      text: why, and what to do; sentences.
    """

    cause: str
    text: str

    def as_record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def without_interruption(
    difference: Difference, reference: Records, repeat: Records, hash_seed_matters: bool | None
) -> Diagnosis:
    """Two runs that nobody interrupted differ: the training is not a function of its config.

    Args:
      difference: of the repeat from the reference.
      reference, repeat: the two runs.
      hash_seed_matters: whether two further runs with the same PYTHONHASHSEED had the same rows;
        None if that was not tried.
    """
    lead = "Two runs without any interruption differ already"
    if difference.what == ROWS:
        return _data_differs(lead, difference, reference, repeat, hash_seed_matters)
    if difference.what == INITIAL:
        return Diagnosis(
            INITIALIZATION,
            f"{lead}, in the state that they begin with ({difference.name}): what makes the model "
            "depends on more than config.seed (the clock, the process, a generator of its own).",
        )
    place = f"at step {difference.step}, in {difference.name}, with the same rows"
    return Diagnosis(
        NONDETERMINISTIC,
        f"{lead}, {place}: an operation of the step gives other bits each time (atomic adds or "
        "autotuned kernels on GPUs, a host callback, a random generator of the host). On GPUs "
        "XLA_FLAGS=--xla_gpu_deterministic_ops=true in cluster.env helps.",
    )


def _data_differs(
    lead: str,
    difference: Difference,
    reference: Records,
    repeat: Records,
    hash_seed_matters: bool | None,
) -> Diagnosis:
    contents, others = _all_rows(reference), _all_rows(repeat)
    shared = len(contents & others) / max(1, len(others))
    what = (
        "the same examples in another order"
        if shared > 0.5
        else "other contents of the examples"
        if shared < 0.05
        else "partly other examples"
    )
    place = f"row {difference.name} of step {difference.step} is another one ({what})"
    if hash_seed_matters:
        return Diagnosis(
            DATA_ORDER,
            f"{lead}: {place}. With PYTHONHASHSEED fixed they agree, so it is the order of a "
            "`set` (or of something else that goes by hash()): sort what is iterated over in the "
            "data.",
        )
    tried = "" if hash_seed_matters is None else ", also with PYTHONHASHSEED fixed"
    return Diagnosis(
        DATA_TIME,
        f"{lead}{tried}: {place}. What makes the examples depends on something that changes from "
        "start to start: the clock, the process id, a random generator without a seed (an "
        "augmentation seeded with the time). Derive it from config.seed and the index.",
    )


def is_certain(difference: Difference, found: Diagnosis) -> bool:
    """Whether it needs no second uninterrupted run to be believed.

    Neither another state than the one saved, nor the rows of another step, comes from an operation
    that gives other bits each time.
    """
    return difference.what == RESTORED or (found.cause == DATA_POSITION and difference.attempt > 0)


def after_interruption(difference: Difference, reference: Records, run: Records) -> Diagnosis:
    """A run that was interrupted differs; why, if two that were not do not.

    Args:
      difference: of the run from the reference.
      reference, run: the two.
    """
    step, resumed, name = difference.step, difference.resumed_at, difference.name
    where = f"the attempt that went on from step {resumed}" if resumed else "an attempt"
    there = where[:1].upper() + where[1:]
    if difference.what == RESTORED:
        return _restored(difference, where)
    if difference.what == ROWS:
        return _rows(difference, reference, run, where)
    if difference.what == LEARNING_RATE:
        text = (
            f"{there} used another learning rate at step {step}: the schedule is no function of "
            "the step alone."
        )
        return Diagnosis(SCHEDULE, text)
    if difference.what == MISSING:
        return Diagnosis(INCOMPLETE, f"step {step} is not on record whole ({name}).")
    at_once = step == resumed + 1
    found = "came out otherwise, from the same state and the same rows"
    late = (
        ""
        if at_once
        else f" It shows {step - resumed} steps after the resume, so what is lost has effect later."
    )
    if difference.what == METRIC and name == "loss":
        return Diagnosis(
            RNG,
            f"In {where} the loss of step {step} {found}: the forward pass depends on something "
            "that is not in the checkpoint, a random generator or counter outside of the model's "
            "state (of NumPy, Python or the Task). Keep it in the model (nnx.Rngs, an "
            f"nnx.Variable), where it is saved.{late}",
        )
    if difference.what == METRIC:
        return Diagnosis(
            HIDDEN_STATE,
            f"In {where} {name} of step {step} {found} and with the same loss: the backward pass "
            f"depends on something that is not in the checkpoint.{late}",
        )
    if difference.what == STATE:
        return _state(difference, where, late)
    return Diagnosis(HIDDEN_STATE, f"{there} began with another state ({name}).")


def _restored(difference: Difference, where: str) -> Diagnosis:
    name, step = difference.name, difference.step
    cause, what = {
        "rng": (RNG, "random numbers start anew"),
        "batch_statistics": (BATCH_STATISTICS, "batch statistics are lost"),
        "optimizer": (OPTIMIZER, "the optimizer's state is lost"),
    }.get(difference.kind, (CHECKPOINT, "what was saved is not what was restored"))
    if difference.kind == "optimizer" and difference.found == "zeros":
        what = "the optimizer's moments were reset"
    more = f" and {len(difference.others)} more leaves differ" if difference.others else " differs"
    return Diagnosis(
        cause,
        f"{where[:1].upper()}{where[1:]} began with a state that is not that of step {step}: "
        f"{name}{more}; {what}.",
    )


def _rows(difference: Difference, reference: Records, run: Records, where: str) -> Diagnosis:
    step = difference.step
    got = next(
        a.steps[step] for a in run.attempts if a.number == difference.attempt and step in a.steps
    )
    row = int(difference.name)
    served = set().union(*got.rows.values())
    shared = {
        number: len(served & set().union(*other.rows.values()))
        for attempt in reference.attempts
        for number, other in sorted(attempt.steps.items())
        if number != step
    }
    number = max(shared, key=lambda one: shared[one], default=0)
    # In another order or with some rows of the next step they are that step's all the same.
    if number and shared[number] > len(served) / 2:
        back = "from the beginning" if number == 1 else f"at step {number}"
        return Diagnosis(
            DATA_POSITION,
            f"In {where}, step {step} was fed the rows of step {number}: the data went on {back}. "
            "Its position is kept in the Task or the source and is not saved: make element i of "
            "train_data() a function of i.",
        )
    if got.rows[row] & _all_rows(reference):
        return Diagnosis(
            DATA_POSITION,
            f"In {where}, step {step} was fed rows that belong elsewhere: the position of the "
            "data, or its order, is kept in the Task or the source and is not saved.",
        )
    return Diagnosis(
        DATA_RANDOM,
        f"In {where}, row {row} of step {step} has other contents than without the interruption, "
        "though two uninterrupted runs agree: a random generator of the data (an augmentation) "
        "goes on by itself and is not saved. Seed it for every example from config.seed and the "
        "index.",
    )


def _state(difference: Difference, where: str, late: str) -> Diagnosis:
    name, step = difference.name, difference.step
    same = f"In {where}, step {step} had the same rows, loss and gradient norm, and yet"
    if difference.kind == "rng":
        text = f"{same} left other random numbers ({name}).{late}"
        return Diagnosis(RNG, text)
    if difference.kind == "batch_statistics":
        text = f"{same} left other batch statistics ({name}): they are computed from more.{late}"
        return Diagnosis(BATCH_STATISTICS, text)
    if difference.kind in ("optimizer", "params"):
        return Diagnosis(
            OPTIMIZER,
            f"{same} made another update ({name}): the optimizer depends on something that is not "
            "in the checkpoint. Moments or counters that a transformation keeps outside of its "
            f"state begin anew with every start.{late}",
        )
    return Diagnosis(HIDDEN_STATE, f"{same} {name} differs: it is computed from more.{late}")


def _all_rows(records: Records) -> set[str]:
    return {
        digest
        for attempt in records.attempts
        for step in attempt.steps.values()
        for digests in step.rows.values()
        for digest in digests
    }
