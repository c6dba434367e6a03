"""Lines of a plan's page: facts, remarks and numbers."""

import re
import textwrap
from collections.abc import Sequence

import click

from launch.plan.plan import Remark
from uniemox_dist.core.formatting import size

UNIT = re.compile(r"(?<=\d) (?=(?:%|[smhdG]|ms|min|kB|[MGT]B)\b|%)")
"""The space between a number and its unit, where lines are not broken."""
WIDTH, LABEL = 112, 12
"""Columns of a line, and of the label at its start."""


def remarks(remarks: Sequence[Remark]) -> list[str]:
    return [warning(text) if status == "warn" else good(text) for status, text in remarks]


def title(text: str) -> str:
    return click.style(text, bold=True)


def fact(label: str, text: str) -> str:
    """A line with a label; a long one continues below its own start."""
    tied = UNIT.sub("\u00a0", text)
    first, *rest = textwrap.wrap(tied, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    lines = [f"{label:{LABEL}}{first}", *(" " * LABEL + line for line in rest)]
    return "\n".join(lines).replace("\u00a0", " ")


def warning(text: str) -> str:
    return verdict(click.style("warn", fg="yellow"), text)


def good(text: str) -> str:
    return verdict(click.style("ok", fg="green"), text)


def verdict(word: str, text: str) -> str:
    line = fact("", text)[LABEL:]
    return word + " " * (LABEL - len(click.unstyle(word))) + line


def gb(count: float) -> str:
    if not count:
        return "–"
    return f"{count / 1e9:.{3 if count < 99.5e6 else 2 if count < 99.5e9 else 0}f}"


def bytes_(count: float) -> str:
    return "–" if not count else size(count)


def power(number: float) -> str:
    digits, exponent = f"{number:.3e}".split("e")
    return f"{float(digits):.4g} x 10^{int(exponent)}"


def rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
