"""What cannot be kept the same at any number of processes is refused by name, before a step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grain

from launch.spec import ConfigError
from trainer.data.filtering import ENDLESS
from trainer.data.mixture import Mixture

if TYPE_CHECKING:
    from trainer.task import Task

_MAX_SHUFFLED = 1 << 32  # Grain's shuffle computes in 32 bits.

# By the names of Grain's classes, which are not public (grain 0.2.18): what it is called where one
# writes it, and what to do instead.
_UNSTABLE = {
    "FilterMapDataset": ("filter()", "use trainer.data.filtering.filtered() on the source"),
    "FlatMapMapDataset": ("FlatMapTransform", "flatten the data when it is prepared"),
}
_STREAMS = {
    "FirstFitPackIterDataset": ("FirstFitPackIterDataset", "trainer.data.packing.packed()"),
    "BestFitPackIterDataset": ("BestFitPackIterDataset", "trainer.data.packing.packed()"),
    "ConcatThenSplitIterDataset": ("ConcatThenSplitIterDataset", "trainer.data.packing.packed()"),
    "MixedIterDataset": ("IterDataset.mix()", "trainer.data.mixture.mixture()"),
    "WindowShuffleIterDataset": (
        "WindowShuffleIterDataset",
        "trainer.data.sources.training_order()",
    ),
    "FilterIterDataset": ("IterDataset.filter()", "trainer.data.filtering.filtered()"),
    # What mp_prefetch() makes in grain 0.2.18.
    "InterleaveIterDataset": (
        "mp_prefetch() or InterleaveIterDataset",
        "the trainer's own reading ahead, or trainer.data.mixture.mixture(),",
    ),
    "MultiprocessPrefetchIterDataset": ("mp_prefetch()", "the trainer's own reading ahead"),
    "ProcessPrefetchIterDataset": ("mp_prefetch()", "the trainer's own reading ahead"),
    "_MpContextIterDataset": ("mp_prefetch()", "the trainer's own reading ahead"),
    "FlatMapIterDataset": ("FlatMapTransform", "a dataset that was flattened when prepared"),
    "ThreadPrefetchIterDataset": ("ThreadPrefetchIterDataset", "the trainer's own reading ahead"),
    "BatchIterDataset": ("batch()", "config.global_batch_size"),
}
# What keeps the number of an example, so that it may stand upon a mixture.
_NUMBER_KEPT = {"MapMapDataset", "MapWithIndexMapDataset", "RandomMapMapDataset"}
_NUMBER_KEPT |= {"_WithSeedMapDataset"}


def training_data(task: Task, seed: int) -> grain.MapDataset:
    """The task's training data.

    Raises:
      ConfigError: it uses random transformations without a seed.
    """
    try:
        return task.train_data(seed)
    except ValueError as error:
        found = re.match(r"`(\w+)` requires a seed", str(error))  # Grain's.
        if not found or isinstance(error, ConfigError):
            raise
        raise ConfigError(
            "config.task",
            f"its train_data uses {found[1]}() without a seed, so that no two processes and no two "
            "starts would agree; put .seed(seed) before it, with the seed that train_data is given",
        ) from None


def check_order(dataset: grain.MapDataset, what: str) -> None:
    """Refuse a dataset whose element i is not known from i alone, or not once an epoch.

    Args:
      dataset: examples in training order.
      what: how messages call it.

    Raises:
      ConfigError: names what it uses, and what to use instead.
    """
    if not isinstance(dataset, grain.MapDataset):
        raise ConfigError("config.task", _no_map_dataset(dataset, what))
    to_visit: list[tuple[grain.MapDataset, str]] = [(dataset, "")]
    while to_visit:
        node, above = to_visit.pop()
        name = type(node).__name__
        for problem in _problems(node, name, above):
            raise ConfigError("config.task", f"the {what} uses {problem}")
        if name not in _NUMBER_KEPT:
            above = f"{_called(name)} upon"
        to_visit.extend((parent, above) for parent in node.parents)


def _problems(node: grain.MapDataset, name: str, above: str) -> Iterator[str]:
    if name in _UNSTABLE:
        called, instead = _UNSTABLE[name]
        yield (
            f"{called}, after which step N's examples are not known without reading all before "
            f"it; {instead}, or keep all examples, with a weight of 0 in the loss"
        )
    if isinstance(node, Mixture) and above:
        yield (
            f"{above} mixture(): an example's number is then not that in the mixture, and its "
            "weights could not change at a step; shuffle, repeat, filter and pack each source, "
            "and mix last"
        )
    parent = node.parents[0] if node.parents else None
    if parent is None:
        return
    if name == "ShuffleMapDataset" and len(parent) >= ENDLESS:
        yield (
            "shuffle() after repeat(), which mixes all epochs: an example comes twice before "
            "another comes once; shuffle first, then repeat (training_order() does)"
        )
    if name == "ShuffleMapDataset" and _MAX_SHUFFLED < len(parent) < ENDLESS:
        yield (
            f"shuffle() of {len(parent):,} examples, more than the {_MAX_SHUFFLED:,} that Grain "
            "can put in order; cut the source into several, and mix them"
        )
    if name == "WindowShuffleMapDataset":
        window = int(node._window_size)
        if len(parent) % window or len(parent) >= ENDLESS:
            shown = "repeated" if len(parent) >= ENDLESS else f"{len(parent):,}"
            yield (
                f"window_shuffle() with windows of {window}, which do not divide its {shown} "
                "examples: those of the last window would come twice or not at all; use a "
                "window_size that divides them and repeat() behind it, or shuffle()"
            )


def _called(name: str) -> str:
    """`shuffle()` of ShuffleMapDataset."""
    word = name.removesuffix("MapDataset").lstrip("_")
    return f"{word[:1].lower()}{word[1:]}()"


def _no_map_dataset(dataset: object, what: str) -> str:
    kind = type(dataset).__name__
    if not isinstance(dataset, grain.IterDataset):
        hint = "; trainer.data.sources.training_order() makes one of a source"
        hint = hint if hasattr(dataset, "__getitem__") else ""
        return f"the {what} is {kind}, and must be a grain.MapDataset{hint}"
    node: object | None = dataset
    while node is not None:
        name = type(node).__name__
        if name in _STREAMS:
            called, instead = _STREAMS[name]
            return (
                f"the {what} uses {called}, a stream that cannot be read at any position, nor go "
                f"on at another number of processes; use {instead} on a grain.MapDataset"
            )
        parents = getattr(node, "parents", ())
        node = parents[0] if parents else None
    return (
        f"the {what} is {kind}, and must be a grain.MapDataset: only that can be read at any "
        "position; leave to_iter_dataset() and batch() to the trainer"
    )
