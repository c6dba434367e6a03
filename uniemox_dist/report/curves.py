"""The curves of a run: which lines of metrics stand after resumes, and small charts of them as inline SVG.

Charts carry no colours of their own: each colour is a CSS variable of the page, so that one drawing serves
light, dark and print. They carry no text of the user's either, only our labels and numbers.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Line = dict[str, Any]

# What matplotlib is told -> the page's variable. The values mean nothing, they are only found again.
_COLOURS = {
    name: f"#00fe{number:02x}"
    for number, name in enumerate(
        (
            "ink",
            "muted",
            "rule",
            "total",
            "relation",
            "similarity",
            "reconstruction",
            "machine",
            "resume",
            "skip",
        ),
        1,
    )
}
MOST_POINTS = 150
"""Points of a curve; more lines are drawn as the mean and range of neighbours."""
LOG_FROM = 30.0
"""A quantity whose largest value is this many medians high is drawn on a logarithmic axis."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class History:
    """What happened on the way to the weights that a run has now."""

    lines: list[Line]
    """Metrics in the order of steps, each step once."""
    resumes: list[int]
    """Steps from which the run went on after a stop."""
    skips: list[int]
    """Steps that changed no weight."""


@dataclass(frozen=True)
class Panel:
    """One quantity over steps."""

    key: str
    title: str
    unit: str
    colour: str
    scale: float = 1.0
    from_zero: bool = False
    suffix: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawn panel."""

    panel: Panel
    svg: str
    latest: str
    lowest: str
    highest: str


PANELS = (
    Panel("loss", "Total loss", "weighted sum", "total"),
    Panel("relation", "Relation, L1", "1 − cosine", "relation"),
    Panel("similarity", "Similarity, L2", "1 − cosine", "similarity"),
    Panel("reconstruction", "Reconstruction, L3", "mean squared error", "reconstruction"),
    Panel("lr", "Learning rate", "learning rate", "machine", from_zero=True),
    Panel("grad_norm", "Gradient norm", "norm before clipping", "machine"),
    Panel("samples_per_s", "Throughput", "samples/s, all ranks", "machine", from_zero=True, suffix=" /s"),
    Panel("data_wait_share", "Waiting for data", "% of the time", "machine", 100.0, True, " %"),
)


def history(metrics: Sequence[Line], events: Sequence[Line]) -> History:
    """What stands of a run's files: a (re)start at step s discards what was written beyond s before."""
    kept: list[Line] = []
    for line in metrics:
        if not isinstance(line.get("step"), int):
            continue
        # A step that comes again replaces the earlier one and all that had followed it.
        while kept and kept[-1]["step"] >= line["step"]:
            kept.pop()
        kept.append(line)
    # Lines beyond the checkpoint that have not been overtaken yet (or are never met).
    for start in (event for event in events if event.get("event") == "start"):
        time, step = _number(start.get("time")), _number(start.get("step"))
        kept = [line for line in kept if not (line["step"] > step and _number(line.get("time")) < time)]
    skips: list[int] = []
    for event in events:
        if event.get("event") == "start":
            skips = [step for step in skips if step <= event.get("step", 0)]
        elif event.get("event") == "skip" and isinstance(event.get("step"), int):
            skips.append(event["step"])
    resumes = {e["step"] for e in events if e.get("event") == "resume" and isinstance(e.get("step"), int)}
    return History(kept, sorted(resumes), skips)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def draw(past: History, loss: Line) -> list[Chart]:
    """A chart for each quantity that has values; a loss that the section `loss` weighs 0 was not computed."""
    charts = []
    for panel in PANELS:
        if panel.key == "relation" and loss.get("relation_form") == "kl":
            panel = replace(panel, unit="KL divergence, nats")
        if panel.key == "reconstruction" and loss.get("norm_pix"):
            panel = replace(panel, unit="mean squared error of standardised patches")
        values = np.array([_number(line.get(panel.key)) * panel.scale for line in past.lines])
        finite = values[np.isfinite(values)]
        if not len(finite) or loss.get(panel.key, 1.0) == 0:
            continue
        steps = np.array([line["step"] for line in past.lines])
        svg = _svg(panel, steps, values, past)
        charts.append(
            Chart(panel, svg, *(show(x) + panel.suffix for x in (finite[-1], finite.min(), finite.max())))
        )
    return charts


def show(value: float) -> str:
    """A number in four digits at most, as people write it."""
    if not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thin(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, ...]:
    """(steps, means, lowest, highest) of at most `most` groups of neighbours; NaN where none is finite."""
    groups = np.array_split(np.arange(len(steps)), min(most, len(steps)))
    rows = []
    for group in groups:
        finite = values[group][np.isfinite(values[group])]
        some = (finite.mean(), finite.min(), finite.max()) if len(finite) else (math.nan,) * 3
        rows.append((steps[group].mean(), *some))
    return tuple(np.array(rows).T)


def _svg(panel: Panel, steps: np.ndarray, values: np.ndarray, past: History) -> str:
    # Text stays text: it takes the page's font, can be selected, and is a tenth of the bytes of outlines.
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": panel.key, "path.simplify": False, "font.size": 10.5}
    ):
        figure = Figure(figsize=(5.2, 2.45))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.12, 0.165, 0.86, 0.7))
        x, mean, low, high = thin(steps, values)
        colour = _COLOURS[panel.colour]
        if len(steps) > len(x):
            axes.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
        axes.plot(x, mean, color=colour, linewidth=1.7, marker="o" if len(x) < 30 else None, markersize=3.5)
        _dress(axes, panel, steps, values)
        _mark(axes, past)
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue(), panel.key)


def _dress(axes: Axes, panel: Panel, steps: np.ndarray, values: np.ndarray) -> None:
    """Axes with units, few ticks, a quiet grid."""
    finite = values[np.isfinite(values)]
    unit = panel.unit
    first, last = int(steps.min()), int(steps.max())
    margin = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:.0f}")
    )
    if not panel.from_zero and finite.min() > 0 and finite.max() > LOG_FROM * np.median(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        unit += ", logarithmic"
    else:
        top, bottom = float(finite.max()), 0.0 if panel.from_zero else float(finite.min())
        room = (top - bottom) * 0.07 or abs(top) * 0.1 or 1.0
        # A quantity that cannot be negative gets no axis that reaches below zero.
        axes.set_ylim(
            0.0 if bottom >= 0 > bottom - room else bottom - room * (not panel.from_zero), top + room
        )
        axes.yaxis.set_major_locator(MaxNLocator(5))
        power = math.floor(math.log10(top)) if 0 < top < 0.01 else 0
        if power:
            unit += " × 10" + str(power).translate(_SUPERSCRIPT)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 10**power:.4g}"))
    axes.set_title(unit, loc="left", fontsize=10.5, color=_COLOURS["muted"], pad=6)
    axes.set_xlabel("step", fontsize=10.5, color=_COLOURS["muted"], labelpad=2)
    axes.grid(axis="y", color=_COLOURS["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=10.5, labelcolor=_COLOURS["ink"], pad=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_COLOURS["muted"])


def _mark(axes: Axes, past: History) -> None:
    """Resumes as dashed lines, skipped steps as crosses along the top."""
    left, right = axes.get_xlim()
    for step in past.resumes:
        if left <= step <= right:
            axes.axvline(step, color=_COLOURS["resume"], linewidth=1.1, linestyle=(0, (4, 3)), zorder=0.9)
    skips = [step for step in past.skips if left <= step <= right]
    high = np.full(len(skips), 0.97)
    axes.plot(
        skips,
        high,
        "x",
        transform=axes.get_xaxis_transform(),
        color=_COLOURS["skip"],
        markersize=5,
        clip_on=False,
    )


def _inline(svg: str, name: str) -> str:
    """An SVG file as an element of our page: no prologue, no size, no names that another chart has too."""
    svg = re.sub(
        r"<!--.*?-->|<style.*?</style>|<metadata>.*?</metadata>",
        "",
        svg[svg.index("<svg") :],
        flags=re.DOTALL,
    )
    svg = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(
        r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    )
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", svg)
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    for variable, value in _COLOURS.items():
        svg = svg.replace(value, f"var(--{variable})")
    return svg.replace("<svg", '<svg aria-hidden="true"', 1).strip()
