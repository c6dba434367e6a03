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
TITLES = {"accuracy": "Validation accuracy", "mean_average_precision": "Validation mAP"}
CLASSES = {"recall": "recall", "precision": "precision", "average_precision": "average precision"}


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
    dimensions: list[tuple[str, int, str, str]]
    """Name, samples, mean absolute error, correlation."""
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
        if "accuracy" in measured:
            low, high = measured["accuracy_interval"]
            figures.append(
                (f"accuracy, {said}", _said(measured["accuracy"]), f"{_said(low)} – {_said(high)}")
            )
            figures.append((f"mean recall, {said}", _said(measured["mean_recall"]), ""))
        else:
            figures.append((f"mAP, {said}", _said(measured["mean_average_precision"]), ""))
            if measured["mean_absolute_error"] is not None:
                figures.append((f"mean absolute error, {said}", _said(measured["mean_absolute_error"]), ""))
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
                _said(row["mean_absolute_error"]),
                _said(row["correlation"]),
            )
            for row in shown.get("dimensions", [])
        ],
        remarks=[str(remark) for remark in found["remarks"]],
    )


def _said(value: Any) -> str:
    return "–" if value is None else show(round(float(value), 3))
