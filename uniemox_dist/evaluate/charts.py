"""The confusion of classes as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

MOST_NUMBERS = 20
"""Classes up to which cells carry their counts."""


def draw_confusion(counts_CC: np.ndarray, names: Sequence[str], title: str, path: Path) -> None:
    """Writes a PNG: rows are true classes, columns answers; colours are shares of a row, numbers are counts."""
    counts = np.asarray(counts_CC)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.2 + 0.5 * len(names)
    figure = Figure(figsize=(side + 0.9, side), dpi=130, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.set_title(title, fontsize=10)
    if len(names) <= MOST_NUMBERS:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[i, j] > 0.55 else "black"
                axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.7)
    figure.savefig(path, metadata={"Software": None})
