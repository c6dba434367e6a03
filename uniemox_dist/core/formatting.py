"""Formats numbers, sizes, durations and times for the terminal, the report page, plans and logs.

This is the only place that formats them. Standard library only.
"""

import json
import math
from collections.abc import Iterable
from datetime import datetime
from typing import Any, TypeGuard

MAX_CHARACTERS = 240
"""Longest printed text of an event; events.jsonl has the whole text."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def duration(seconds: float) -> str:
    """A duration in its two largest units, such as `2 d 3 h`, `1 h 05 min`, `1 min 05 s` or `5 s`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    return f"{h} h {m:02d} min" if h else f"{m} min {s:02d} s" if m else f"{s} s"


def short_duration(seconds: float | None) -> str:
    """The time of a step or a save in three digits, such as `420 ms` or `3.1 s`; a dash for None."""
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def moment(seconds: Any, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A time in seconds since 1970, in the time zone of this machine, as in the logs of Slurm and the ranks.

    Returns a dash for other values.
    """
    if not is_number(seconds):
        return "–"
    try:
        return datetime.fromtimestamp(seconds).strftime(form)
    except (ValueError, OverflowError, OSError):  # outside the years that datetime supports
        return "–"


def zone(seconds: float) -> str:
    """The time zone of `moment`, such as `CET (UTC+01:00)`."""
    local = datetime.fromtimestamp(seconds).astimezone()
    offset = local.strftime("%z")
    name = local.tzname() or ""
    if name == "UTC" or not offset:
        return "UTC"
    utc = f"UTC{offset[:3]}:{offset[3:5]}"
    return f"{name} ({utc})" if name.isalpha() else utc


def size(count: float) -> str:
    """Bytes in decimal units, such as `1.3 GB`, `37.9 MB` or `12 bytes`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB" if count >= 1000 else f"{count:.0f} bytes"


def gigabytes(count: float) -> str:
    """Bytes in GB without the unit, for columns: three decimals below 0.1 GB, none from 100 GB on; a dash for 0."""
    if not count:
        return "–"
    return f"{count / 1e9:.{3 if count < 99.5e6 else 2 if count < 99.5e9 else 0}f}"


def millions(parameters: float) -> str:
    """A number of parameters, such as `5.72 M` or `86.1 M`."""
    return f"{parameters / 1e6:.{2 if parameters < 10e6 else 1}f} M"


def power_of_ten(number: float) -> str:
    """A large number, such as `3.214 x 10^18`."""
    digits, exponent = f"{number:.3e}".split("e")
    return f"{float(digits):.4g} x 10^{int(exponent)}"


def rate(number: float) -> str:
    """A number per second or hour: three digits below 100, otherwise a whole number, such as `8.25` or `1,234`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def format_range(values: Iterable[float], unit: str, digits: int = 3) -> str:
    """The smallest and the largest value, such as `1.2 … 3.4 GB`; one number if both read the same."""
    ordered = sorted(values)
    low, high = (
        f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}" for value in (ordered[0], ordered[-1])
    )
    return f"{low} {unit}" if low == high else f"{low} … {high} {unit}"


def counted(count: int, word: str) -> str:
    """A number with its noun, such as `1 rank` or `1,234 files`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def short(value: Any) -> str:
    """A value of an event, on one line of limited length."""
    if isinstance(value, list):
        rest = f" … {len(value) - 2} more" if len(value) > 3 else ""
        return cut(", ".join(map(str, value[:2] if rest else value)) or "none") + rest
    return cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def cut(text: str, most: int = MAX_CHARACTERS) -> str:
    """A text on one line of limited length, without characters that could control a terminal."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return line if len(line) <= most else f"{line[:most].rstrip()} …"
