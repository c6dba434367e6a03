"""The pace of a run: how long it may be silent, and how long it will take. Pure."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from uniemox_dist.config.data_sections import RunConfig
from uniemox_dist.core.formatting import is_number
from uniemox_dist.runs.history import Length, Line, number, of

STALLED_INTERVALS, STALLED_S = 5, 60.0
"""A run that trains is stalled after so many of its usual intervals without a line, and these seconds at least."""
RECENT = 50
"""Metrics of the last attempt that its pace is taken from."""


def seconds(run: Mapping[str, Any], key: str) -> float:
    """A time-out of the section `run`, or its default."""
    value = run.get(key)
    return value if is_number(value) else RunConfig.model_fields[key].default


def of_last_attempt(lines: Sequence[Line], events: Sequence[Line]) -> Sequence[Line]:
    """Its recent metrics."""
    starts = of(events, "start")
    began = number(starts[-1].get("time")) if starts else 0.0
    return [line for line in lines[-RECENT:] if number(line.get("time")) >= began]


def patience_s(config: Mapping[str, Any], lines: Sequence[Line], *, starting: bool) -> float:
    """Seconds without a line after which a process that lives is stalled."""
    run = config.get("run") or {}
    gaps = [number(b.get("time")) - number(a.get("time")) for a, b in pairwise(lines)]
    if starting:
        return seconds(run, "start_timeout_s")
    if not lines:  # the first step, in which the model may be compiled
        compiles = (config.get("compute") or {}).get("compile")
        return max(seconds(run, key) for key in ("start_timeout_s", *["compile_timeout_s"] * bool(compiles)))
    if not gaps:  # a first line and no pace yet
        return seconds(run, "step_timeout_s")
    return max(STALLED_S, STALLED_INTERVALS * median(gaps))


def left_s(lines: Sequence[Line], events: Sequence[Line], length: Length, step: int) -> float | None:
    """Seconds of work that are left after the newest line, at the median pace of the last attempt's recent lines: one
    that waited long, for a disk or a network, does not count."""
    recent = of_last_attempt(lines, events)
    if not length.steps:
        return None
    paces = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(recent)]
    return max(0, length.steps - step) * max(0.0, median(paces)) if paces else None
