"""The bytes of text files as examples, and the order in which training reads a source.

A source is Grain's: a length, and examples by index. Here and in `trainer.data.records` an example
is `{'tokens': [seq_len + 1]}`: inputs are all tokens but the last, targets all but the first.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np

from launch.spec import ConfigError, require

Example = dict[str, np.ndarray]

_BLOCK_BYTES = 64 * 1024


def training_order(source: grain.sources.RandomAccessDataSource, seed: int) -> grain.MapDataset:
    """All examples of `source` again and again, every epoch in a new order.

    Each epoch is a permutation of its own. Element i is found without looking at those before it,
    so a run resumes anywhere at no cost, and the order depends on `seed` alone.

    Raises:
      ConfigError: the seed is negative, or the source is empty.
    """
    require(seed >= 0, "config.seed", seed, "must be 0 or more")
    if len(source) == 0:
        raise ConfigError("config.data", "holds no examples")
    # shuffle() before repeat(): the other way round it would draw from all epochs at once.
    return fixed_order(source).seed(seed).shuffle().repeat()


def fixed_order(source: grain.sources.RandomAccessDataSource) -> grain.MapDataset:
    """The examples of `source` once, in its own order: for evaluation, or to build upon."""
    return _SourceDataset(source)


class _SourceDataset(grain.MapDataset):
    """Does what `grain.MapDataset.source` does, without its metrics.

    Those cost 10 us for every row of a batched read in Grain 0.2.18, more than the read itself.
    """

    def __init__(self, source: grain.sources.RandomAccessDataSource):
        super().__init__()
        self.source = source
        self._length = len(source)

    def __len__(self) -> int:
        return self._length

    def __str__(self) -> str:
        return f"_SourceDataset({type(self.source).__name__})"

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return self.source[index % self._length]  # Later epochs are the same examples.

    def _getitems(self, indices: Sequence[int]) -> Sequence[Any]:
        return read_many(self.source, [index % self._length for index in indices])


def read_many(
    source: grain.sources.RandomAccessDataSource, indices: Sequence[int]
) -> Sequence[Any]:
    """Examples of a source, by its own way to read many at once where it has one."""
    together = getattr(source, "_getitems", None)
    return together(indices) if together else [source[index] for index in indices]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The bytes of some text files, one file after the other.

    Attributes:
      data: [N] uint8, read-only; a single file is mapped, several are held in memory.
      num_files: files in it.
      num_skipped: files that matched and could not be read.
      ends: [num_files] int64, where each file's bytes end; None for one file.
    """

    data: np.ndarray
    num_files: int
    num_skipped: int
    ends: np.ndarray | None = None

    @functools.cached_property
    def unigram_entropy(self) -> float:
        """Entropy of a byte in nats: the loss of a model that knows only how often each occurs."""
        counts: np.ndarray = np.zeros(256, np.int64)
        # In pieces, since bincount makes an int64 copy of what it is given.
        for start in range(0, len(self.data), 1 << 22):
            counts += np.bincount(self.data[start : start + (1 << 22)], minlength=256)
        shares = counts[counts > 0] / len(self.data)
        return float(-(shares * np.log(shares)).sum())


def read_corpus(
    path: str | Sequence[str], pattern: str = "*", exclude: Sequence[str] = ()
) -> Corpus:
    """Read text files, in the order of their paths.

    Args:
      path: a file or a directory, read with all below it; or several.
      pattern: which names in a directory to read, e.g. `*.py`. Hidden ones are left out.
      exclude: names of directories to leave out, e.g. `site-packages`.

    Raises:
      ConfigError: a path is missing, no name matches, nothing can be read, or all files are empty.
    """
    paths = [path] if isinstance(path, str) else list(path)
    files: list[str] = []
    for item in map(os.path.expanduser, paths):
        if os.path.isdir(item):
            files.extend(_files_below(item, pattern, exclude))
        elif os.path.exists(item):
            files.append(item)
        else:
            raise ConfigError("config.data.path", "no such file or directory", item)
    if not files:
        raise ConfigError("config.data.pattern", f"matches no file below {paths}", pattern)
    if len(files) == 1:
        data, ends, num_skipped = _map_file(files[0]), None, 0
    else:
        data, ends = _concatenate(files)
        num_skipped = len(files) - len(ends)
    if num_skipped == len(files):
        raise ConfigError("config.data.path", f"none of its {num_skipped} files can be read", path)
    if not len(data):
        raise ConfigError("config.data.path", f"its {len(files)} files are empty", path)
    data.flags.writeable = False  # Examples are views: an in-place map() would change the corpus.
    return Corpus(data, len(files) - num_skipped, num_skipped, ends)


def _files_below(directory: str, pattern: str, exclude: Sequence[str]) -> list[str]:
    found: list[str] = []
    for root, directories, names in os.walk(directory):
        directories[:] = [d for d in directories if d not in exclude and not d.startswith(".")]
        matching = fnmatch.filter(names, pattern)
        found.extend(os.path.join(root, name) for name in matching if not name.startswith("."))
    # By path below the directory, so that hosts with other prefixes agree.
    return sorted(found, key=lambda file: os.path.relpath(file, directory).split(os.sep))


def _map_file(file: str) -> np.ndarray:
    if os.path.isfile(file) and os.path.getsize(file) == 0:
        return np.empty(0, np.uint8)  # Nothing to map.
    try:
        return np.memmap(file, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ConfigError("config.data.path", f"cannot be read: {error}", file) from None


def _concatenate(files: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all files that can be read, and where each one's end."""
    content = bytearray()
    ends = []
    for name in files:
        try:
            if not os.path.isfile(name):  # A pipe, say, which would block.
                raise OSError("not a file")
            with open(name, "rb", buffering=0) as file:
                content += file.read()
        except OSError:
            continue
        ends.append(len(content))
    return np.frombuffer(content, np.uint8), np.array(ends, np.int64)


class ByteWindows:
    """Windows of `seq_len + 1` bytes of one split of a corpus: `{'tokens': uint8 [seq_len + 1]}`.

    The corpus is cut into blocks of 64 KiB (smaller ones if there would be fewer than
    `eval_every`, but never shorter than a window), and every `eval_every`-th block is held out for
    evaluation; with fewer blocks, the last one. A window lies within the train or within the eval
    bytes, so the splits share no byte. Windows overlap by one byte, so that each byte is predicted
    once an epoch. They may cross the border of two files.

    Args:
      corpus: of `read_corpus`.
      seq_len: tokens to predict per example.
      split: 'train' or 'eval'.
      eval_every: one of how many blocks is held out; 0 for none (and an empty eval split).

    Raises:
      ConfigError: the corpus is too small for one window of each split.
    """

    def __init__(self, corpus: Corpus, seq_len: int, split: str, eval_every: int = 50):
        require(seq_len >= 1, "config.data.seq_len", seq_len, "must be at least 1")
        rule = "must be 0 (nothing held out) or at least 2"
        require(eval_every == 0 or eval_every >= 2, "config.data.eval_every", eval_every, rule)
        if split not in ("train", "eval"):
            raise ValueError(f"split={split!r} is neither 'train' nor 'eval'")
        self._data = corpus.data
        self._seq_len = seq_len
        needed = (seq_len + 1) * (2 if eval_every else 1)
        require(
            len(corpus.data) >= needed,
            "config.data.seq_len",
            seq_len,
            f"needs a corpus of at least {needed:,} bytes (windows of {seq_len + 1}), and config."
            f"data.path has {len(corpus.data):,}; use more text or a shorter seq_len",
        )
        held_out = _held_out(len(corpus.data), seq_len + 1, eval_every)
        spans = held_out if split == "eval" else _between(held_out, len(corpus.data))
        starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
        self._span_starts = starts
        # How many windows come before each span, and in all.
        self._offsets = np.concatenate([[0], np.cumsum((stops - starts - 1) // seq_len)])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self._getitems([int(index)])[0]

    def _getitems(self, indices: Sequence[int]) -> list[Example]:
        """Many at once, which Grain asks for (SupportsBatchedReadRandomAccessDataSource)."""
        index = np.asarray(indices, np.int64)
        span = np.searchsorted(self._offsets, index, side="right") - 1
        starts = self._span_starts[span] + (index - self._offsets[span]) * self._seq_len
        length, data = self._seq_len + 1, self._data
        return [{"tokens": data[start : start + length]} for start in starts.tolist()]

    def __repr__(self) -> str:
        # Grain shows it in messages, and must not show the corpus.
        return f"ByteWindows({len(self)} windows of {self._seq_len + 1} bytes)"


def _held_out(num_bytes: int, window: int, every: int) -> list[tuple[int, int]]:
    """The spans [start, stop) of an evaluation split, in order; see ByteWindows."""
    if not every:
        return []
    block = max(window, min(_BLOCK_BYTES, num_bytes // every))
    num_blocks = num_bytes // block
    blocks = range(every - 1, num_blocks, every) if num_blocks >= every else [num_blocks - 1]
    return [(k * block, (k + 1) * block) for k in blocks]


def _between(spans: Sequence[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """What `spans` leave of [0, end)."""
    starts = [0, *(stop for _, stop in spans)]
    stops = [*(start for start, _ in spans), end]
    return [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]
