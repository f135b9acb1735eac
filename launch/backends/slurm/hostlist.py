"""SLURM's way to write many host names in one word: `n[1-3,7]`, `a[01-04]b[1-2]`. Pure."""

from __future__ import annotations

import itertools
import re

_MOST_HOSTS = 1 << 16
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand(text: str) -> list[str]:
    """The host names that a list stands for, in its order, as `scontrol show hostnames` has them.

    Raises:
      ValueError: it is no such list.
    """
    hosts: list[str] = []
    for word in _split(text):
        hosts += _expand_word(word)
    return hosts


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    words, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise ValueError(f"unbalanced brackets in host list {text!r}")
        if character == "," and depth == 0:
            words.append(text[start:place])
            start = place + 1
    if depth:
        raise ValueError(f"unbalanced brackets in host list {text!r}")
    words.append(text[start:])
    return [word for word in words if word]


def _expand_word(word: str) -> list[str]:
    """The names of one word; brackets further right run faster."""
    parts: list[list[str]] = []
    for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", word):
        parts.append([literal] if literal else _expand_ranges(ranges, word))
    names = ["".join(part) for part in itertools.product(*parts)]
    return names


def _expand_ranges(text: str, word: str) -> list[str]:
    numbers: list[str] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item)
        if not match:
            raise ValueError(f"{item!r} is no range of numbers in host list {word!r}")
        first, last = match.group(1), match.group(2) or match.group(1)
        count = int(last) - int(first) + 1
        if not 1 <= count <= _MOST_HOSTS:
            raise ValueError(f"{item!r} is no range of at most {_MOST_HOSTS} hosts in {word!r}")
        # Zeros in front of the first number give the width.
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return numbers
