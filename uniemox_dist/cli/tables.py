"""Columns, lines of facts, and verdicts for the terminal."""

import re
import textwrap
from collections.abc import Sequence

import click

GAP = 2
"""Spaces between two columns."""
UNIT = re.compile(r"(?<=\d) (?=(?:%|[smhdG]|ms|min|kB|[MGT]B)\b|%)")
"""A no-break space, between a number and its unit."""
WIDTH, LABEL = 112, 12
"""Characters of a line and of its label."""


def columns(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    width: int = 0,
    drop: Sequence[str] = (),
    shrink: dict[str, int] | None = None,
) -> list[str]:
    """Lines of a table.

    A column whose cells are all empty or a dash is left out.

    Args:
        left: columns that are aligned left; the others are aligned right.
        width: characters of the terminal; 0 for no limit.
        drop: columns to leave out, in this order, until the table fits into `width`.
        shrink: columns that may be cut to these widths before any is dropped.
    """
    shrink = shrink or {}
    table = [[*head], *([*row] for row in rows)]
    kept = [i for i in range(len(head)) if not rows or any(row[i] not in ("", "–") for row in rows)]
    natural = {i: max(len(click.unstyle(row[i])) for row in table) for i in kept}

    def least(i: int) -> int:
        return min(natural[i], max(len(head[i]), shrink.get(head[i], natural[i])))

    droppable = [name for name in drop if name in head]
    while width and droppable and sum(map(least, kept)) + GAP * (len(kept) - 1) > width:
        gone = head.index(droppable.pop(0))
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
            # Paths are cut at the beginning, because their end matters most.
            cell = f"…{cell[1 - room :]}" if head[i] == "run" else f"{cell[: room - 1]}…"
        blank = " " * (room - len(click.unstyle(cell)))
        cells.append(cell + blank if head[i] in left else blank + cell)
    line = (" " * GAP).join(cells).rstrip()
    if width and len(click.unstyle(line)) > width:
        line = f"{click.unstyle(line)[: width - 1]}…"
    return line


def title(text: str) -> str:
    """A heading."""
    return click.style(text, bold=True)


def render_fact(label: str, text: str) -> str:
    """A label and a text, which is wrapped and indented below its own beginning."""
    tied = UNIT.sub("\u00a0", text)
    first, *rest = textwrap.wrap(tied, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    lines = [f"{label:{LABEL}}{first}", *(" " * LABEL + line for line in rest)]
    return "\n".join(lines).replace("\u00a0", " ")


def render_warning(text: str) -> str:
    """A text with the verdict `warn`."""
    return render_verdict(click.style("warn", fg="yellow"), text)


def render_ok(text: str) -> str:
    """A text with the verdict `ok`."""
    return render_verdict(click.style("ok", fg="green"), text)


def render_verdict(word: str, text: str) -> str:
    """A text with a word before it."""
    line = render_fact("", text)[LABEL:]
    return word + " " * (LABEL - len(click.unstyle(word))) + line
