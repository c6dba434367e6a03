"""Times, durations, sizes and other values as people say them; for terminal and report. Standard library only."""

import json
import math
from datetime import datetime
from typing import Any, TypeGuard

MOST_CHARACTERS = 240
"""Longest text of an event that is shown; events.jsonl has all of it."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether this is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
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
    """A time in seconds since 1970 in this machine's zone, which Slurm and the logs of the ranks show as well; a dash
    for what is none."""
    if not is_number(seconds):
        return "–"
    try:
        return datetime.fromtimestamp(seconds).strftime(form)
    except (ValueError, OverflowError, OSError):  # no year that a calendar has
        return "–"


def zone(seconds: float) -> str:
    """The zone of `moment` at a time, such as `CET (UTC+01:00)`."""
    local = datetime.fromtimestamp(seconds).astimezone()
    offset = local.strftime("%z")
    name = local.tzname() or ""
    if name == "UTC" or not offset:
        return "UTC"
    said = f"UTC{offset[:3]}:{offset[3:5]}"
    return f"{name} ({said})" if name.isalpha() else said


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB" if count >= 1000 else f"{count:.0f} bytes"


def counted(count: int, word: str) -> str:
    """A number with its noun."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def short(value: Any) -> str:
    """A value of an event in one line of limited length."""
    if isinstance(value, list):
        rest = f" … {len(value) - 2} more" if len(value) > 3 else ""
        return cut(", ".join(map(str, value[:2] if rest else value)) or "none") + rest
    return cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text in one line, without what could steer a terminal, and of limited length."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return line if len(line) <= most else f"{line[:most].rstrip()} …"
