"""How a run went, drawn over the time of day: steps of each attempt, and below them what happened."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from uniemox_dist.core.formatting import is_number
from uniemox_dist.runs.attempts import Attempt, Numbers
from uniemox_dist.runs.history import Line, number
from uniemox_dist.runs.report.svg import COLOURS, FONT_SIZE, dress, figure

MOST_POINTS = 200
"""Points of an attempt's line."""
MOST_MARKS = 300
"""Marks of a lane: saves of a long run would otherwise be most of the page."""
UNITS = (("days", 86400.0, 3.0), ("hours", 3600.0, 3.0), ("minutes", 60.0, 3.0), ("seconds", 1.0, 0.0))
"""(unit, its seconds, from how many of it on it is taken)."""


@dataclass(frozen=True)
class Lane:
    """A kind of marks."""

    title: str
    kinds: tuple[str, ...]
    mark: str
    colour: str


LANES = (
    Lane("saves", ("save",), "|", "machine"),
    Lane("skipped", ("skip",), "x", "skip"),
    Lane("spikes", ("spike",), "^", "wait"),
    Lane("slow ranks", ("straggler",), "s", "similarity"),
    Lane("pictures replaced", ("damaged",), ".", "muted"),
    Lane("faults", ("fault",), "X", "bad"),
    Lane("killed", (), "X", "ink"),
    Lane("restarts", ("restart",), ">", "restart"),
    Lane("requeues", ("requeue", "resubmit"), ">", "requeue"),
    Lane("jobs start", ("job",), "|", "requeue"),
    Lane("stops", ("signal",), "s", "wait"),
)


def lanes_of(told: Numbers, events: Sequence[Line]) -> list[tuple[Lane, list[float]]]:
    """The lanes that have marks, with their times in seconds since 1970."""
    found = [(lane, told.killed if lane.title == "killed" else _times(events, lane)) for lane in LANES]
    return [(lane, times) for lane, times in found if times]


def draw_timeline(told: Numbers, metrics: Sequence[Line], events: Sequence[Line]) -> str | None:
    """The drawing as an element of the page; None for a run that never began."""
    attempts = told.attempts
    if not attempts:
        return None
    began = attempts[0].began
    last = max([attempts[-1].ended, *(e["time"] for e in events if is_number(e.get("time")))])
    unit, scale = next((u, s) for u, s, least in UNITS if last - began >= least * s)
    lanes = lanes_of(told, events)
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
    """Steps over time: a line for each attempt, on a ground as wide as it lasted; what was lost is drawn in red."""
    for i, attempt in enumerate(attempts):
        until = attempts[i + 1].began if i + 1 < len(attempts) else math.inf
        own = [
            (line["time"], line["step"])
            for line in metrics
            if isinstance(line.get("step"), int) and attempt.began <= number(line.get("time")) < until
        ]
        own = [(attempt.began, attempt.first_step), *own, (attempt.ended, attempt.last_step)]
        chosen = np.unique(np.linspace(0, len(own) - 1, min(MOST_POINTS, len(own))).round().astype(int))
        x = (np.array([own[i][0] for i in chosen]) - began) / scale
        y = np.maximum.accumulate(np.array([own[i][1] for i in chosen], float))
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
    dress(axes)


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
    dress(axes)
    axes.set_yticks(range(len(lanes)), [lane.title for lane, _ in lanes])
    axes.set_ylim(len(lanes) - 0.5, -0.5)


def _times(events: Sequence[Line], lane: Lane) -> list[float]:
    def kind(event: Line) -> object:
        return "damaged" if "damaged" in event else event.get("event")

    return [e["time"] for e in events if kind(e) in lane.kinds and is_number(e.get("time"))]
