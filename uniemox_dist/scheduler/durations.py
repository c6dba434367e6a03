"""Durations in Slurm's notation, as `--time` takes them and squeue prints them."""

import re


def parse_duration(text: str) -> float | None:
    """Seconds of a Slurm duration.

    The forms are `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, `days-hours:minutes` and
    `days-hours:minutes:seconds` (sbatch(1), `--time`).

    Returns:
        None if the text is not a duration: UNLIMITED, INFINITE, NOT_SET, INVALID, N/A and any other text.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip(), re.ASCII)
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (numbers + [0, 0])[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, numbers[0], (numbers[1] if len(numbers) == 2 else 0)
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
