"""Makes a table, a summary in words and a chart from the scores of all runs of an ablation."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from uniemox_dist.core.files import write_json, write_text
from uniemox_dist.evaluate.intervals import Bootstrap
from uniemox_dist.evaluate.protocol import STUDENT
from uniemox_dist.evaluate.subject import TEACHER, UNTRAINED

Scores = dict[str, list[list[dict[str, Any]]]]
"""For each trained row and each seed, the metrics of `uniemox evaluate protocol --scores`."""
RESAMPLES = 2000
KINDS = {"trained": "#3346b8", "beside": "#55657f", "trivial": "#b85c08"}


def write_table(found: Scores, wanted: Sequence[str], about: dict[str, Any], out: Path) -> str:
    """Writes table.json, table.md and table.png; returns the Markdown."""
    metrics = [metric for name in wanted if (metric := _metric(found, name))]
    result = {"format": "uniemox-ablation", "format_version": 1, **about, "metrics": metrics}
    result["reading"] = [sentence for metric in metrics for sentence in reading(metric)]
    write_json(out / "table.json", result)
    text = markdown(result)
    write_text(out / "table.md", text)
    draw(metrics, out / "table.png")
    return text


def _metric(found: Scores, name: str) -> dict[str, Any] | None:
    """A column: every row's mean, spread and interval, and its difference from the first trained row."""
    first = next(iter(found))
    whole = [_named(metrics, name) for metrics in found[first]]
    if whole[0] is None:
        return None
    bootstrap = Bootstrap(whole[0]["clusters"], RESAMPLES)
    scores: dict[str, np.ndarray] = {}
    kinds: dict[str, str] = {}
    for row, by_seed in found.items():
        of_row = [_named(metrics, name) for metrics in by_seed]
        if all(of_row):  # a student without a decoder has no masked error
            scores[row], kinds[row] = _stacked(of_row, STUDENT), "trained"
    for row in sorted(whole[0]["rows"], key=lambda r: (r != UNTRAINED, r != TEACHER)):
        if row != STUDENT:
            scores[row] = _stacked(whole, row)
            kinds[row] = "beside" if row in (UNTRAINED, TEACHER) else "trivial"
    rows = []
    for row, values in scores.items():
        line = {"row": row, "kind": kinds[row], **asdict(bootstrap.row(values))}
        if row != first:
            line["minus_first"] = asdict(bootstrap.difference(values, scores[first]))
        rows.append(line)
    facts = {key: whole[0][key] for key in ("name", "title", "better", "primary", "note")}
    return {**facts, "n": len(whole[0]["clusters"]), "clusters": len(set(whole[0]["clusters"])), "rows": rows}


def _named(metrics: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((metric for metric in metrics if metric["name"] == name), None)


def _stacked(of_row: Sequence[Any], row: str) -> np.ndarray:
    return np.array([metric["rows"][row] for metric in of_row])


def reading(metric: dict[str, Any]) -> list[str]:
    """Describes how the first row compares with the others, by the intervals of paired differences."""
    first, *others = metric["rows"]
    sign = 1 if metric["better"] == "higher" else -1
    groups: dict[tuple[str, str], list[str]] = {}
    for row in others:
        # How much better the first row is than the other.
        gain = sorted(-sign * row["minus_first"][bound] for bound in ("low", "high"))
        word = "better" if gain[0] > 0 else "worse" if gain[1] < 0 else "open"
        groups.setdefault((row["kind"], word), []).append(row["row"])
    words = {
        "better": "better than",
        "open": "statistically tied with",
        "worse": "worse than",
    }

    def sentence(kinds: Sequence[str]) -> str:
        parts = []
        for word, text in words.items():
            names = [name for kind in kinds for name in groups.get((kind, word), [])]
            if names:
                parts.append(f"{text} {', '.join(names)}")
        return "; ".join(parts)

    subject = f"{metric['title']}: {first['row']}"
    ablated, beside = sentence(["trained"]), sentence(["beside", "trivial"])
    return [f"{subject}: {text}." for text in (ablated, beside) if text]


def markdown(result: dict[str, Any]) -> str:
    """The table, the differences from the first row, and the summary in words."""
    metrics = result["metrics"]
    titles = [f"{m['title']} {'↑' if m['better'] == 'higher' else '↓'}" for m in metrics]
    seeds = len(result["seeds"])
    lines = [
        f"Mean over {seeds} {'seed' if seeds == 1 else 'seeds'} ± standard deviation between seeds, and 95 % interval.",
        "",
        f"| | {' | '.join(titles)} |",
        f"|---{'|---' * len(metrics)}|",
    ]
    names = list(dict.fromkeys(row["row"] for metric in metrics for row in metric["rows"]))
    digits = [3 if metric["rows"][0]["mean"] >= 0.1 else 4 for metric in metrics]
    by_name = [{row["row"]: row for row in metric["rows"]} for metric in metrics]
    for name in names:
        cells = [_cell(rows.get(name), n) for rows, n in zip(by_name, digits)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    trained = [row["row"] for row in metrics[0]["rows"] if row["kind"] == "trained"]
    if len(trained) > 1:
        lines += ["", f"Difference from {trained[0]}, paired by picture and seed:", ""]
        lines += [f"| | {' | '.join(titles)} |", f"|---{'|---' * len(metrics)}|"]
        for name in trained[1:]:
            cells = [_difference(rows.get(name), n) for rows, n in zip(by_name, digits)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"- {sentence}" for sentence in result["reading"])]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None, digits: int) -> str:
    if row is None:
        return "–"
    spread = f" ± {row['spread']:.{digits}f}" if round(row["spread"], digits) else ""
    return f"{row['mean']:.{digits}f}{spread} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def _difference(row: dict[str, Any] | None, digits: int) -> str:
    if row is None:
        return "–"
    found = row["minus_first"]
    mark = "**" if found["low"] > 0 or found["high"] < 0 else ""
    bounds = f"[{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
    return f"{mark}{found['mean']:+.{digits}f}{mark} {bounds}"


def draw(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws one panel per metric: means as dots on their intervals, seeds as small circles.

    An axis spans the trained rows and the best others. A row far outside of it is drawn as an arrow with its mean.
    """
    names = list(dict.fromkeys(row["row"] for metric in metrics for row in metric["rows"]))
    figure = Figure(figsize=(13, 0.34 * len(names) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics):
        left, right = _span(metric)
        for row in metric["rows"]:
            y, colour = names.index(row["row"]), KINDS[row["kind"]]
            if not left <= row["mean"] <= right:
                below = row["mean"] < left
                text = f"← {row['mean']:.3f}" if below else f"{row['mean']:.3f} →"
                at, side = (left, "left") if below else (right, "right")
                axes.text(at, y, text, color=colour, fontsize=8.5, va="center", ha=side)
                continue
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot(row["mean"], y, "o", color=colour, markersize=7)
            if row["spread"] > 1e-3 * abs(row["mean"]):
                axes.plot(
                    row["by_seed"], [y] * len(row["by_seed"]), "o", color="white", mec=colour, markersize=4
                )
        axes.axvline(metric["rows"][0]["mean"], color=KINDS["trained"], linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_xlim(left, right)
        axes.set_title(f"{metric['title']} ({metric['better']} is better)", fontsize=10, loc="left")
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="both", color="#e3e1da", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=130, facecolor="white")


def _span(metric: dict[str, Any]) -> tuple[float, float]:
    """The rows that an axis must span: the trained rows, the teacher, and the best trivial row."""
    sign = 1 if metric["better"] == "higher" else -1
    held = [row for row in metric["rows"] if row["kind"] == "trained" or row["row"] == TEACHER]
    held += sorted(
        (row for row in metric["rows"] if row["kind"] == "trivial"), key=lambda r: -sign * r["mean"]
    )[:1]
    low, high = min(row["low"] for row in held), max(row["high"] for row in held)
    room = 0.15 * (high - low) or 0.01
    return low - room, high + room
