"""Charts of matplotlib as elements of our page.

They carry no colours of their own: each colour is a CSS variable of the page, so that one drawing serves light, dark
and print. They carry no text of the user's either, only our labels and numbers.
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

# What matplotlib is told -> the page's variable. The values mean nothing, they are only found again.
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
    """An empty figure of these inches to draw on; when the block ends, its SVG is the only item of the list."""
    svg: list[str] = []
    # Text stays text: it takes the page's font, can be selected, and is a tenth of the bytes of outlines.
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


def dress(axes: Axes) -> None:
    """A quiet grid, no ticks, one line below."""
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=FONT_SIZE, labelcolor=COLOURS["ink"], pad=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["muted"])


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
    svg = re.sub(r' id="([^"]*)"', lambda m: _named(m[1], name, used), svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", svg)
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    for variable, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{variable})")
    return svg.replace("<svg", '<svg aria-hidden="true"', 1).strip()


def _named(group: str, chart: str, used: set[str]) -> str:
    """The attribute that keeps a group's name: an id where it is referred to, a class where it says what is drawn."""
    if group in used:
        return f' id="{chart}-{group}"'
    return f' class="{group}"' if group.startswith(("curve", "mark-", "marks-")) else ""
