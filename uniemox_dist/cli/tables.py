"""Plain columns for the terminal."""

from collections.abc import Sequence

import click

GAP = 2
"""Spaces between two columns."""


def columns(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    width: int = 0,
    drop: Sequence[str] = (),
    shrink: dict[str, int] | None = None,
) -> list[str]:
    """Lines of a table: columns named in `left` start at their left edge, the others end at their right one.

    A column whose cells are all empty or a dash is left out. In a terminal of `width` characters (0: any) those
    named in `drop` are left out as well, the first first, until the rest fits; before that, those in `shrink` may be
    cut to the widths given there.
    """
    shrink = shrink or {}
    table = [[*head], *([*row] for row in rows)]
    kept = [i for i in range(len(head)) if not rows or any(row[i] not in ("", "–") for row in rows)]
    natural = {i: max(len(click.unstyle(row[i])) for row in table) for i in kept}

    def least(i: int) -> int:
        return min(natural[i], max(len(head[i]), shrink.get(head[i], natural[i])))

    doomed = [name for name in drop if name in head]
    while width and doomed and sum(map(least, kept)) + GAP * (len(kept) - 1) > width:
        gone = head.index(doomed.pop(0))
        kept = [i for i in kept if i != gone]
    widths = {i: natural[i] for i in kept}
    for name in shrink:
        i = head.index(name)
        over = sum(widths.values()) + GAP * (len(kept) - 1) - width
        if width and i in widths and over > 0:
            widths[i] = max(least(i), widths[i] - over)
    return [_line(row, head, widths, left, width) for row in table]


def _line(
    row: Sequence[str], head: Sequence[str], widths: dict[int, int], left: Sequence[str], width: int
) -> str:
    cells = []
    for i, room in widths.items():
        cell = row[i]
        if len(click.unstyle(cell)) > room:
            cell = click.unstyle(cell)
            # Of a path the end tells most.
            cell = f"…{cell[1 - room :]}" if head[i] == "run" else f"{cell[: room - 1]}…"
        blank = " " * (room - len(click.unstyle(cell)))
        cells.append(cell + blank if head[i] in left else blank + cell)
    line = (" " * GAP).join(cells).rstrip()
    if width and len(click.unstyle(line)) > width:
        line = f"{click.unstyle(line)[: width - 1]}…"
    return line
