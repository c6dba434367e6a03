"""The results of a fine-tuning run for the page: the validations, and the scores of the best weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from uniemox_dist.core.files import read_json
from uniemox_dist.runs.events.base import Line
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.history import History
from uniemox_dist.runs.metric_table import number
from uniemox_dist.runs.report.curves import Chart, Panel, draw_chart, show

FORMAT = ("uniemox-finetune", 1)
TITLES = {
    "accuracy": "Validation accuracy",
    "mean_average_precision": "Validation mAP",
    "kl_divergence": "Validation KL divergence",
}
MEASURES = {
    "kl_divergence": "KL divergence",
    "chebyshev": "Chebyshev distance",
    "clark": "Clark distance",
    "canberra": "Canberra metric",
    "cosine": "cosine",
    "intersection": "intersection",
}
"""Measures of distributions."""
MEANS = {
    "mean_absolute_error": "mean absolute error",
    "mean_correlation": "mean correlation",
    "mean_ccc": "mean CCC",
}
"""Means over the dimensions."""
CLASSES = {
    "recall": "recall",
    "precision": "precision",
    "average_precision": "average precision",
    "mean_share": "mean share",
    "mean_estimate": "mean estimate",
}


@dataclass(frozen=True)
class Result:
    """The parts of finetune.json that the page shows."""

    best_step: int
    counts: list[tuple[str, int]]
    """Samples of each split."""
    figures: list[tuple[str, str, str]]
    """Name of a figure, its value, and its interval (empty without one)."""
    classes_of: str
    """The split that the table of classes describes."""
    columns: list[str]
    classes: list[tuple[str, int, list[str]]]
    """Label, samples, and a cell for each column."""
    dimensions: list[tuple[str, int, list[str]]]
    """Name, samples, and mean absolute error, correlation and concordance, each with its interval."""
    remarks: list[str]


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuning run; `result` is None until it has ended."""

    labels: int | None
    validation: Chart | None
    result: Result | None


def read_finetuning(folder: RunFolder, config: Line, history: History) -> Finetuned | None:
    """Reads the results of a run's folder; None for a pretraining run."""
    if not isinstance(config.get("finetune"), dict):
        return None
    try:
        found = read_json(folder.path / "finetune.json")
        whole = found if (found["format"], found["format_version"]) == FORMAT else None
        result, labels = (_result(whole), len(whole["labels"])) if whole else (None, None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        result, labels = None, None
    stated = config["finetune"].get("labels")
    if labels is None and isinstance(stated, list | tuple) and stated:
        labels = len(stated)
    return Finetuned(labels, _validation(folder, history), result)


def _validation(folder: RunFolder, history: History) -> Chart | None:
    # For a step that was repeated after a resume, the last line counts.
    lines = {x["step"]: x for x in read_lines(folder.path / "validation.jsonl") if type(x.get("step")) is int}
    if not lines:
        return None
    steps = np.array(sorted(lines))
    values = np.array([number(lines[step].get("value")) for step in steps])
    metric = str(lines[int(steps[-1])].get("metric"))
    panel = Panel("validation", TITLES.get(metric, "Validation"), metric.replace("_", " "), "good")
    return draw_chart(panel, steps, values, history)


def _result(found: dict[str, Any]) -> Result:
    figures: list[tuple[str, str, str]] = []
    for split in ("val", "test"):
        measured, said = found[split], "validation" if split == "val" else split
        if measured is None:
            continue
        for name, title in MEASURES.items():
            if name in measured:
                figures.append((f"{title}, {said}", _said(measured[name]), _interval(measured, name)))
        if "accuracy" in measured:
            figures.append(
                (f"accuracy, {said}", _said(measured["accuracy"]), _interval(measured, "accuracy"))
            )
            figures.append((f"mean recall, {said}", _said(measured["mean_recall"]), ""))
        else:
            figures.append((f"mAP, {said}", _said(measured["mean_average_precision"]), ""))
        for name, title in MEANS.items():
            if measured.get(name) is not None:
                figures.append((f"{title}, {said}", _said(measured[name]), ""))
    split = "test" if found["test"] is not None else "val"
    shown = found[split]
    columns = [key for key in CLASSES if key in shown["per_class"][0]]
    return Result(
        best_step=int(found["best_step"]),
        counts=[(name, int(count)) for name, count in found["samples"].items() if count is not None],
        figures=figures,
        classes_of=split,
        columns=[CLASSES[key] for key in columns],
        classes=[
            (str(row["label"]), int(row["samples"]), [_said(row[key]) for key in columns])
            for row in shown["per_class"]
        ],
        dimensions=[
            (
                str(row["dimension"]),
                int(row["samples"]),
                [_cell(row, name) for name in ("mean_absolute_error", "correlation", "ccc")],
            )
            for row in shown.get("dimensions", [])
        ],
        remarks=[str(remark) for remark in found["remarks"]],
    )


def _interval(found: dict[str, Any], name: str) -> str:
    """The interval of a value; empty if it has none."""
    interval = found.get(f"{name}_interval")
    return f"{_said(interval[0])} – {_said(interval[1])}" if interval else ""


def _cell(row: dict[str, Any], name: str) -> str:
    interval = _interval(row, name)
    return _said(row.get(name)) + (f" ({interval})" if interval else "")


def _said(value: Any) -> str:
    return "–" if value is None else show(round(float(value), 3))
