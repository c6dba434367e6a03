"""Converts matplotlib's charts to elements of the report page.

Each colour in a chart is a CSS variable of the page, so that one drawing works in light, dark and print. Charts
contain no text of the user, only this package's labels and numbers.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from uniemox_dist.config.losses import LOSS_NAMES

# CSS variable of the page -> placeholder colour for matplotlib, which `_inline` replaces by the variable.
COLOURS = {
    name: f"#00fe{number:02x}"
    for number, name in enumerate(
        (
            "ink",
            "muted",
            "rule",
            "total",
            *LOSS_NAMES,
            "machine",
            "resume",
            "requeue",
            "restart",
            "skip",
            "good",
            "wait",
            "bad",
        ),
        1,
    )
}
FONT_SIZE = 10.5


@contextmanager
def figure(name: str, width: float, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """Yields an empty figure of this size in inches, and a list that contains its SVG when the block ends."""
    svg: list[str] = []
    # Text is not converted to outlines: it uses the page's font, can be selected, and has a tenth of the bytes.
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": False, "font.size": FONT_SIZE}
    ):
        drawn = Figure(figsize=(width, height))
        FigureCanvasAgg(drawn)
        yield drawn, svg
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawn.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg.append(_inline(text.getvalue(), name))


def style_axes(axes: Axes) -> None:
    """Styles axes: a light grid, no ticks, only the bottom spine."""
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=FONT_SIZE, labelcolor=COLOURS["ink"], pad=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["muted"])


def _inline(svg: str, name: str) -> str:
    """Converts an SVG file to an element of the page: without prologue and size, and with ids that no other chart
    has."""
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
    svg = re.sub(r' id="([^"]*)"', lambda m: _named(m[1], name, used), svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", svg)
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    for variable, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{variable})")
    return svg.replace("<svg", '<svg aria-hidden="true"', 1).strip()


def _named(group: str, chart: str, used: set[str]) -> str:
    """The attribute for a group's name: an id if something refers to it, a class if it names a drawn part, otherwise
    none."""
    if group in used:
        return f' id="{chart}-{group}"'
    return f' class="{group}"' if group.startswith(("curve", "mark-", "marks-")) else ""
