"""Documents of tokens, of any length: whole text files, and records. Made to be packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np

from launch.spec import ConfigError, require
from trainer.data.sources import Corpus, Example


class ByteDocuments:
    """The files of one split of a corpus: document i is `{'tokens': uint8 [n]}`.

    Every `eval_every`-th file is held out for evaluation; with fewer files, the last one.

    Args:
      corpus: of `read_corpus`.
      split: 'train' or 'eval'.
      eval_every: one of how many files is held out; 0 for none.

    Raises:
      ConfigError: there are not enough files for both splits.
    """

    def __init__(self, corpus: Corpus, split: str, eval_every: int = 50):
        if split not in ("train", "eval"):
            raise ValueError(f"split={split!r} is neither 'train' nor 'eval'")
        ends = np.array([len(corpus.data)]) if corpus.ends is None else corpus.ends
        field = "config.data.eval_every"
        ok = eval_every == 0 or eval_every >= 2
        require(ok, field, eval_every, "must be 0 (nothing held out) or at least 2")
        if eval_every and len(ends) < 2:
            rule = "one file of text cannot be split into whole documents; use 0 (nothing held out)"
            raise ConfigError(field, rule, eval_every)
        held_out: np.ndarray = np.zeros(len(ends), bool)
        if eval_every:
            held_out[eval_every - 1 :: eval_every] = True
            held_out[-1] |= not held_out.any()
        chosen = np.flatnonzero(held_out if split == "eval" else ~held_out)
        self._data = corpus.data
        self._ends = ends[chosen]
        self._starts = np.concatenate([[0], ends])[chosen]
        self.key = ["bytes", split, eval_every, ends.tolist()]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: SupportsIndex) -> Example:
        number = int(index)
        return {"tokens": self._data[self._starts[number] : self._ends[number]]}

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """[N] int64, bytes of each document."""
        return (self._ends - self._starts)[list(indices)]

    def __repr__(self) -> str:
        return f"ByteDocuments({len(self)} files)"
