"""The section of the page about how a run went: a timeline, figures of attempts and saves, and the events as rows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from uniemox_dist.core.formatting import counted, duration, is_number, moment, short, short_duration, size
from uniemox_dist.runs.events.base import Lane, Line
from uniemox_dist.runs.events.jobs import JobStart, Restart
from uniemox_dist.runs.events.reading import CLASSES, describe, find_class
from uniemox_dist.runs.events.training import Save, Spike, Start
from uniemox_dist.runs.history import KILLED, Attempt, History
from uniemox_dist.runs.metric_table import column
from uniemox_dist.runs.report.svg import COLOURS, FONT_SIZE, figure, style_axes

MOST_POINTS = 200
"""Points of the line of an attempt."""
MOST_MARKS = 300
"""Largest number of marks in a row; otherwise the saves of a long run would be most of the page."""
KILLED_LANE = Lane("killed", "X", "ink", row=70)
UNITS = (("days", 86400.0, 3.0), ("hours", 3600.0, 3.0), ("minutes", 60.0, 3.0), ("seconds", 1.0, 0.0))
"""(unit, its seconds, the smallest length of a run in that unit)."""


def list_figures(history: History, *, over: bool = False) -> list[tuple[str, str, str, str]]:
    """(name, value, remark, tone) of each figure."""
    if not history.attempts:
        return []
    first, last = history.attempts[0], history.attempts[-1]
    restarts, killed = len(history.select(Restart)), len(history.find_killed(over=over))
    idle_s = last.ended - first.began - history.work_s
    found = [
        (
            "Attempts",
            str(len(history.attempts)),
            f"{duration(max(0.0, idle_s))} between them" if len(history.attempts) > 1 else "",
            "",
        ),
        ("Restarts", str(restarts), "by the launcher", "wait" if restarts else ""),
        *((("Requeues", str(history.requeues), "of its job", ""),) if history.requeues else ()),
        ("Stops", str(history.stops), "by signals", ""),
        ("Killed", str(killed), "no exit message", "bad" if killed else ""),
        ("Faults", str(history.faults), _damaged(history.bad_samples), "bad" if history.faults else ""),
        (
            "Steps lost",
            f"{history.lost_steps:,}",
            "repeated after a resume",
            "bad" if history.lost_steps else "",
        ),
        ("Skipped", f"{len(history.skips):,}", "steps, not finite", "bad" if history.skips else ""),
        ("Loss spikes", f"{len(history.select(Spike)):,}", "events", "wait" if history.select(Spike) else ""),
    ]
    return found + _saves(history)


def _damaged(count: int) -> str:
    return f"{counted(count, 'picture')} replaced" if count else ""


def _saves(history: History) -> list[tuple[str, str, str, str]]:
    count = history.median_of(Save, "bytes")
    found = [("Saves", f"{len(history.select(Save)):,}", "" if count is None else f"{size(count)} each", "")]
    for title, key in (("A save takes", "seconds"), ("Training waits for it", "blocked_s")):
        value = history.median_of(Save, key)
        if value is not None:
            found.append((title, short_duration(value), "median", ""))
    return found


def make_event_row(event: Line) -> dict[str, Any]:
    """An event as a row of the table: time, kind, tone, text, and the values that the text leaves out."""
    text, rest = describe(event)
    kind = find_class(event)
    return {
        "time": moment(event.get("time")),
        "event": str(event.get("event", "?")),
        "tone": kind.tone if kind is not None else "",
        "text": text,
        "facts": [(key, short(value)) for key, value in rest.items()],
    }


def make_attempt_rows(history: History, *, over: bool = False) -> list[dict[str, str]]:
    """Each attempt: its beginning, duration, steps, ranks, hosts, job and end."""
    starts = [event for event in history.select(Start) if is_number(event.get("time"))]
    jobs = [event for event in history.select(JobStart) if is_number(event.get("time"))]
    killed = history.find_killed(over=over)
    rows = []
    for attempt, start in zip(history.attempts, starts):
        before = [job for job in jobs if job["time"] <= start["time"]]
        hosts = start.get("hosts") or ([start["host"]] if start.get("host") else [])
        ranks, stage = start.get("ranks"), start.get("zero_stage")
        rows.append(
            {
                "began": moment(attempt.began),
                "lasted": duration(attempt.ended - attempt.began),
                "steps": f"{attempt.first_step:,} – {attempt.last_step:,}",
                "lost": f"{attempt.lost_steps:,} lost" if attempt.lost_steps else "",
                "ranks": short(ranks) if ranks is not None else "–",
                "stage": f"ZeRO-{stage}" if isinstance(stage, int) else "",
                "hosts": short(hosts) if hosts else "–",
                "job": short(before[-1].get("job_id")) if before else "–",
                "end": _describe_end(attempt, killed=attempt.ended in killed),
            }
        )
    return rows


def _describe_end(attempt: Attempt, *, killed: bool) -> str:
    if attempt.last_kind == "fault" or attempt.reason:
        return f"a fault: {short(attempt.reason)}" if attempt.reason else "a fault"
    end = {"end": "complete", "signal": "stopped by a signal"}.get(attempt.last_kind)
    return end or (KILLED if killed else "continues, or ended without an event")


def collect_lanes(history: History, *, over: bool = False) -> list[tuple[Lane, list[float]]]:
    """The rows of the timeline that have marks, with their times in seconds since 1970.

    Args:
        over: whether the last attempt has ended, as all earlier ones have.
    """
    lanes = {KILLED_LANE, *(found.lane for found in CLASSES if found.lane is not None)}
    times: dict[Lane, list[float]] = {lane: [] for lane in sorted(lanes, key=lambda lane: lane.row)}
    times[KILLED_LANE] = history.find_killed(over=over)
    for event in history.events:
        kind = find_class(event)
        if kind is not None and kind.lane is not None and is_number(event.get("time")):
            times[kind.lane].append(event["time"])
    return [(lane, found) for lane, found in times.items() if found]


def draw_timeline(history: History, *, over: bool = False) -> str | None:
    """The drawing as an SVG element of the page; None for a run that never started."""
    attempts, metrics, events = history.attempts, history.metrics, history.events
    if not attempts:
        return None
    began = attempts[0].began
    last = max([attempts[-1].ended, *(e["time"] for e in events if is_number(e.get("time")))])
    unit, scale = next((u, s) for u, s, least in UNITS if last - began >= least * s)
    lanes = collect_lanes(history, over=over)
    height = 2.9 + 0.27 * len(lanes)
    with figure("timeline", 10.6, height) as (drawn, svg):
        low = 0.5 / height
        lanes_share = 0.27 * len(lanes) / height
        top = drawn.add_axes((0.125, low + lanes_share + 0.12 / height, 0.865, 2.0 / height))
        _steps(top, attempts, metrics, began, scale)
        bottom = top
        if lanes:
            bottom = drawn.add_axes((0.125, low, 0.865, lanes_share), sharex=top)
            _lanes(bottom, lanes, began, scale)
            top.tick_params(labelbottom=False)
        margin = max((last - began) / scale * 0.012, 1e-3)
        top.set_xlim(-margin, (last - began) / scale + margin)
        bottom.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        bottom.set_xlabel(
            f"{unit} since the first start", fontsize=FONT_SIZE, color=COLOURS["muted"], labelpad=2
        )
    return svg[0]


def _steps(
    axes: Axes, attempts: Sequence[Attempt], metrics: Sequence[Line], began: float, scale: float
) -> None:
    """Draws steps over time: a line for each attempt on a shaded area; lost steps are red."""
    times, reached = np.asarray(column(metrics, "time")), np.asarray(column(metrics, "step"))
    for i, attempt in enumerate(attempts):
        until = attempts[i + 1].began if i + 1 < len(attempts) else math.inf
        own = np.flatnonzero(np.isfinite(reached) & (times >= attempt.began) & (times < until))
        chosen = np.unique(np.linspace(0, len(own) + 1, min(MOST_POINTS, len(own) + 2)).round().astype(int))
        shown = own[chosen[1:-1] - 1]  # between its beginning and its end
        x = (np.array([attempt.began, *times[shown], attempt.ended]) - began) / scale
        y = np.maximum.accumulate(np.array([attempt.first_step, *reached[shown], attempt.last_step], float))
        left, right = (attempt.began - began) / scale, (attempt.ended - began) / scale
        axes.axvspan(left, right, color=COLOURS["total"], alpha=0.07, linewidth=0)
        axes.plot(x, y, color=COLOURS["total"], linewidth=1.8, solid_capstyle="round")
        kept = attempt.last_step - attempt.lost_steps
        if attempt.lost_steps:
            axes.plot(
                np.concatenate([[np.interp(kept, y, x)], x[y > kept]]),
                np.concatenate([[kept], y[y > kept]]),
                color=COLOURS["bad"],
                linewidth=2.6,
                solid_capstyle="round",
            )
    axes.set_title("steps", loc="left", fontsize=FONT_SIZE, color=COLOURS["muted"], pad=6)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.set_ylim(bottom=min(0, *(a.first_step for a in attempts)) if len(attempts) > 1 else None)
    style_axes(axes)


def _lanes(axes: Axes, lanes: Sequence[tuple[Lane, list[float]]], began: float, scale: float) -> None:
    for row, (lane, seen) in enumerate(lanes):
        times = np.array(seen)
        if len(times) > MOST_MARKS:
            times = times[np.linspace(0, len(times) - 1, MOST_MARKS).round().astype(int)]
        colour = COLOURS[lane.colour]
        axes.plot(
            (times - began) / scale,
            np.full(len(times), row),
            lane.mark,
            color=colour,
            markersize=6,
            markeredgewidth=1.4 if lane.mark in "|x" else 0,
        )
    style_axes(axes)
    axes.set_yticks(range(len(lanes)), [lane.title for lane, _ in lanes])
    axes.set_ylim(len(lanes) - 0.5, -0.5)
