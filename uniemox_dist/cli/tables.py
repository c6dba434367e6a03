"""Plain columns for the terminal."""

from collections.abc import Sequence

import click


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()) -> list[str]:
    """Lines of a table: columns named in `left` start at their left edge, the others end at their right one.

    A column whose cells are all empty or a dash is left out.
    """
    kept = [i for i in range(len(head)) if not rows or any(row[i] not in ("", "–") for row in rows)]
    table = [[row[i] for i in kept] for row in (head, *rows)]
    widths = [max(len(click.unstyle(row[i])) for row in table) for i in range(len(kept))]
    lines = []
    for row in table:
        cells = []
        for i, cell in enumerate(row):
            blank = " " * (widths[i] - len(click.unstyle(cell)))
            cells.append(cell + blank if head[kept[i]] in left else blank + cell)
        lines.append("  ".join(cells).rstrip())
    return lines
