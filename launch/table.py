"""Rows as a table that fits the terminal. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_GAP = "  "
_LEAST = 8  # Columns that a cell keeps when it is cut.


def table(
    rows: Sequence[Sequence[str]],
    width: int | None,
    right: Collection[int] = (),
    squeeze: Sequence[int] = (),
    keep_end: Collection[int] = (),
) -> list[str]:
    """Lines of a table.

    Args:
      rows: of cells, the heads of the columns first.
      width: characters that a line may have; None for as many as it takes.
      right: columns that are aligned to the right.
      squeeze: columns that give way, in this order, when a line would be too long.
      keep_end: columns whose end is kept when they are cut, not their beginning.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = [index for index in range(len(widths)) if any(row[index] for row in rows[1:])]
    over = 0 if width is None else sum(widths[i] + len(_GAP) for i in shown) - len(_GAP) - width
    for index in squeeze:
        give = max(0, min(over, widths[index] - _LEAST)) if index in shown else 0
        widths[index] -= give
        over -= give
    lines = []
    for row in rows:
        cells = [
            _cut(row[i], widths[i], i in keep_end).rjust(widths[i])
            if i in right
            else _cut(row[i], widths[i], i in keep_end).ljust(widths[i])
            for i in shown
        ]
        lines.append(_GAP.join(cells).rstrip())
    return lines


def _cut(text: str, width: int, keep_end: bool) -> str:
    if len(text) <= width:
        return text
    return "…" + text[len(text) - width + 1 :] if keep_end else text[: width - 1] + "…"
