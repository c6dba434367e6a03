"""Bar charts as inline SVG for the report. Colours are CSS variables, so that one drawing works in light, dark and
print; all text is our own labels and numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shards.inspect.emotions import Values
from shards.inspect.stats import Tally

BINS = 32
PADDING = 4
"""Free places on both sides of a single value."""
WIDE = 8 * BINS
"""Ranges with more whole numbers than this get a logarithmic axis."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 440, 190, 46, 34, 10


@dataclass(frozen=True)
class Histogram:
    """One quantity of one or several data sets."""

    title: str
    unit: str
    svg: str
    median: str


def value_histogram(title: str, unit: str, values: Sequence[Values]) -> Histogram | None:
    """How often the values of a dimension occur, in percent of each data set's values; None if nothing was counted.

    Whole numbers get one bar each, unless there are many; all others get bins of equal width.
    """
    known = [each for each in values if each.count]
    if not known:
        return None
    low, high = min(each.least for each in known), max(each.most for each in known)
    whole = high - low < BINS and all(value.is_integer() for each in known for value in each.counts)
    step = 1.0 if whole else _nice(max((high - low) / BINS, abs(high) / 100))
    first = math.floor(low / step) - PADDING
    tallies = []
    for each in values:
        tally = Tally()
        places = [round(value / step) - first for value in each.counts]
        tally.add(np.repeat(np.array(places, np.int64), list(each.counts.values())))
        tallies.append(tally)
    chart = histogram(title, unit, tallies, step, first * step)
    joined = sum((each.counts for each in known), start=Counter[float]())
    ascending = sorted(joined)
    place = np.searchsorted(np.cumsum([joined[value] for value in ascending]), joined.total() / 2)
    return chart and replace(chart, median=f"{ascending[int(place)]:,.4g}")


def histogram(
    title: str, unit: str, tallies: Sequence[Tally], scale: float = 1.0, offset: float = 0.0
) -> Histogram | None:
    """How often values occur, in percent of each data set; None if nothing was counted.

    Values are those of the tallies times `scale`, plus `offset`. A few different values get one bar each. Many get
    bins of equal width, on a logarithmic axis if their range is wide.
    """
    joined = Tally()
    for tally in tallies:
        joined.add(np.repeat(tally.values, np.minimum(tally.counts[tally.values], 1)))
    values = joined.values
    if not len(values):
        return None
    low, high = int(values[0]), int(values[-1])
    if len(values) <= 12 and high - low < 40:
        padding = max(
            0, (2 * PADDING - 1 - (high - low)) // 2
        )  # so that a single value does not fill the chart
        edges = np.arange(max(0, low - padding), high + padding + 2) - 0.5
        is_log = False
    else:
        is_log = not offset and low > 0 and high > 8 * low and high - low > WIDE
        edges = _log_edges(low, high) if is_log else _even_edges(low, high)
    shares = [_shares(tally, edges) for tally in tallies]
    whole = Tally()
    for tally in tallies:
        counts = np.zeros(max(len(whole.counts), len(tally.counts)), np.int64)
        counts[: len(whole.counts)] += whole.counts
        counts[: len(tally.counts)] += tally.counts
        whole.counts = counts
    median = whole.quantile(0.5) * scale + offset
    return Histogram(title, unit, _draw(edges, shares, scale, offset, is_log), f"{median:,.4g}")


def _even_edges(low: int, high: int) -> np.ndarray:
    width = math.ceil((high - low + 1) / BINS)  # a whole number, so that all bins have equally many values
    return np.arange(low, high + width + 1, width) - 0.5


def _log_edges(low: int, high: int) -> np.ndarray:
    edges = np.round(
        np.geomspace(low, high + 1, BINS + 1)
    )  # between whole numbers, so that every bin has some
    return np.unique(edges) - 0.5


def _shares(tally: Tally, edges: np.ndarray) -> np.ndarray:
    counts, _ = np.histogram(tally.values, bins=edges, weights=tally.counts[tally.values])
    return 100 * counts / max(1, tally.total)


def _draw(edges: np.ndarray, shares: list[np.ndarray], scale: float, offset: float, is_log: bool) -> str:
    top = max(1e-9, max(float(share.max()) for share in shares))
    step = _nice(top / 3)
    top = step * math.ceil(top / step - 1e-9)
    at = np.log(edges) if is_log else edges
    x = LEFT + (at - at[0]) / (at[-1] - at[0]) * (WIDTH - LEFT - 8)
    plot = HEIGHT - BOTTOM - TOP

    def y(value: float) -> float:
        return TOP + plot * (1 - value / top)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for i in range(round(top / step) + 1):
        value = i * step
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g} %</text>')
    fill = 0.8 if len(shares) > 1 else 1.0  # a gap between the groups of bars
    for number, share in enumerate(shares):
        for i, value in enumerate(share):
            width = fill * (x[i + 1] - x[i]) / len(shares)
            left = x[i] + (1 - fill) / 2 * (x[i + 1] - x[i]) + number * width
            if value > 0:
                parts.append(
                    f'<rect x="{left + 0.5:.1f}" width="{max(1.0, width - 1):.1f}" y="{y(value):.1f}" '
                    f'height="{max(0.7, TOP + plot - y(value)):.1f}" class="s{number % 4}"/>'
                )
    for tick, place in _ticks(edges, x, is_log, scale, offset):
        parts.append(f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    return "".join([*parts, "</svg>"])


def _ticks(
    edges: np.ndarray, x: np.ndarray, is_log: bool, scale: float, offset: float
) -> list[tuple[str, float]]:
    """(text, x) of the ticks on the axis."""
    single = np.allclose(np.diff(edges), 1) and (edges[0] % 1) == 0.5
    if single:
        middles = (edges[:-1] + edges[1:]) / 2
        every = math.ceil(len(middles) / 12)
        return [
            (f"{m * scale + offset:g}", float((x[i] + x[i + 1]) / 2))
            for i, m in enumerate(middles)
            if i % every == 0
        ]
    low, high = float(edges[0]) * scale + offset, float(edges[-1]) * scale + offset
    if is_log:
        ticks = [m * 10.0**e for e in range(-3, 9) for m in (1, 2, 5)]
        ticks = [t for t in ticks if low <= t <= high]
        ticks = ticks[:: math.ceil(len(ticks) / 6)] or [low]
    else:
        step = _nice((high - low) / 5)
        ticks = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    places = np.interp([(t - offset) / scale for t in ticks], edges, x)
    return [(_short(tick), float(place)) for tick, place in zip(ticks, places)]


def _nice(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-12)))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= value * 0.999)


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
