"""The curves of a run: small charts of its valid metrics."""

import math
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from uniemox_dist.config.losses import LOSS_TERMS
from uniemox_dist.runs.events.base import Line
from uniemox_dist.runs.history import History
from uniemox_dist.runs.metric_table import column
from uniemox_dist.runs.report.svg import COLOURS, FONT_SIZE, figure, style_axes

MOST_POINTS = 150
"""Points of a curve; more lines are drawn as the mean and range of neighbours."""
LOG_FROM = 30.0
"""A quantity whose largest value is this many medians high is drawn on a logarithmic axis."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


RESUMES: dict[str, tuple[str, tuple[float, ...]]] = {
    "restart": ("restarted by the launcher", (1, 1.5)),
    "requeue": ("requeued by Slurm", (6, 2, 1, 2)),
    "resume": ("resumed", (4, 3)),
}
"""Reason of a resume -> its legend on the page, and the dashes of its line."""


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
    *(Panel(t.name, f"{t.name.capitalize()}, {t.symbol}", t.unit, t.name) for t in LOSS_TERMS),
    Panel("lr", "Learning rate", "learning rate", "machine", from_zero=True),
    Panel("grad_norm", "Gradient norm", "norm before clipping", "machine"),
    Panel("samples_per_s", "Throughput", "samples/s, all ranks", "machine", from_zero=True, suffix=" /s"),
    Panel("data_wait_share", "Waiting for data", "% of the time", "machine", 100.0, True, " %"),
)


def draw(history: History, loss: Line) -> list[Chart]:
    """A chart for each quantity that has values; losses of weight 0 in the section `loss` are left out."""
    charts = []
    for panel in PANELS:
        if panel.key == "relation" and loss.get("relation_form") == "kl":
            panel = replace(panel, unit="KL divergence, nats")
        if panel.key == "reconstruction" and loss.get("norm_pix"):
            panel = replace(panel, unit="mean squared error of standardised patches")
        if loss.get(panel.key, 1.0) != 0 and (chart := draw_metric(panel, history)) is not None:
            charts.append(chart)
    return charts


def draw_metric(panel: Panel, history: History) -> Chart | None:
    """Draws a metric of the training steps; None if no value is finite."""
    steps = np.asarray(column(history.lines, "step")).astype(np.int64)
    return draw_chart(panel, steps, np.asarray(column(history.lines, panel.key)) * panel.scale, history)


def draw_chart(panel: Panel, steps: np.ndarray, values: np.ndarray, history: History) -> Chart | None:
    """Draws a panel; None if no value is finite."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    svg = _svg(panel, steps, values, history)
    return Chart(panel, svg, *(show(x) + panel.suffix for x in (finite[-1], finite.min(), finite.max())))


def show(value: float) -> str:
    """A number with at most four digits, such as `0.1234` or `1.20·10⁻⁵`."""
    if not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thin_out(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, ...]:
    """Returns (steps, means, lowest, highest) of at most `most` groups of neighbours; NaN if no value of a group is
    finite. All groups except the last have the same size, because a curve with varying smoothing would look as if the
    run had changed."""
    size = max(1, math.ceil(len(steps) / most))
    groups = [np.arange(first, min(first + size, len(steps))) for first in range(0, len(steps), size)]
    rows = []
    for group in groups:
        finite = values[group][np.isfinite(values[group])]
        some = (finite.mean(), finite.min(), finite.max()) if len(finite) else (math.nan,) * 3
        rows.append((steps[group].mean(), *some))
    return tuple(np.array(rows).T)


def _svg(panel: Panel, steps: np.ndarray, values: np.ndarray, history: History) -> str:
    with figure(panel.key, 5.2, 2.45) as (drawn, svg):
        axes = drawn.add_axes((0.12, 0.165, 0.86, 0.7))
        x, mean, low, high = thin_out(steps, values)
        colour = COLOURS[panel.colour]
        if len(steps) > len(x):
            axes.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
        dots = "o" if len(x) < 30 else None
        axes.plot(x, mean, color=colour, linewidth=1.7, marker=dots, markersize=3.5, gid="curve")
        _dress(axes, panel, steps, values, history)
        _mark(axes, history)
    return svg[0]


def _dress(axes: Axes, panel: Panel, steps: np.ndarray, values: np.ndarray, history: History) -> None:
    """Styles axes: units, few ticks, a light grid. They reach to the last mark, which may follow the last value."""
    finite = values[np.isfinite(values)]
    unit = panel.unit
    first, last = int(steps.min()), max(int(steps.max()), *history.skips, *history.spikes, 0)
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
        # The axis of a quantity that cannot be negative does not extend below zero.
        axes.set_ylim(
            0.0 if bottom >= 0 > bottom - room else bottom - room * (not panel.from_zero), top + room
        )
        axes.yaxis.set_major_locator(MaxNLocator(5))
        power = math.floor(math.log10(top)) if 0 < top < 0.01 else 0
        if power:
            unit += " × 10" + str(power).translate(_SUPERSCRIPT)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 10**power:.4g}"))
    axes.set_title(unit, loc="left", fontsize=FONT_SIZE, color=COLOURS["muted"], pad=6)
    axes.set_xlabel("step", fontsize=FONT_SIZE, color=COLOURS["muted"], labelpad=2)
    style_axes(axes)


def _mark(axes: Axes, history: History) -> None:
    """Draws resumes as vertical lines, dashed by reason, and skipped steps as crosses and spikes as triangles along
    the top. The group of each mark has the kind and step as its id, for tests and for readers of the page's source."""
    left, right = axes.get_xlim()
    for kind, (_, dashes) in RESUMES.items():
        for step in history.find_resumes(kind):
            if left <= step <= right:
                axes.axvline(
                    step,
                    color=COLOURS[kind],
                    linewidth=1.1,
                    linestyle=(0, dashes),
                    zorder=0.9,
                    gid=f"mark-{kind}-{step}",
                )
    for kind, steps, mark, colour in (
        ("skip", history.skips, "x", "skip"),
        ("spike", history.spikes, "v", "wait"),
    ):
        shown = [step for step in steps if left <= step <= right]
        if shown:
            axes.plot(
                shown,
                np.full(len(shown), 0.97),
                mark,
                transform=axes.get_xaxis_transform(),
                color=COLOURS[colour],
                markersize=5,
                markeredgewidth=1.0 if mark == "x" else 0,
                clip_on=False,
                gid=f"marks-{kind}",
            )
