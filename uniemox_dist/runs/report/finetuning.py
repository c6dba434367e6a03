"""The results of a fine-tuning run for the page: the validations, and the scores of the best weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from uniemox_dist.config.finetune import DISTRIBUTION_TITLES
from uniemox_dist.core.files import read_json
from uniemox_dist.runs.events.base import Line
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.history import History
from uniemox_dist.runs.metric_table import number
from uniemox_dist.runs.report.curves import Chart, Panel, draw_chart, draw_metric, show

FORMAT = ("uniemox-finetune", 1)
VALIDATED = {
    "accuracy": ("Validation accuracy", "accuracy"),
    "mean_average_precision": ("Validation mAP", "mean average precision"),
    "kl_divergence": ("Validation KL divergence", "KL divergence"),
    "mean_ccc": ("Validation CCC", "mean concordance (CCC)"),
}
"""Title and unit of the curve of validations, by the metric that chooses the best weights."""
PANELS = (
    Panel("labels", "Loss of the labels", "part of the total loss", "relation"),
    Panel("categories", "Loss of the categories", "part of the total loss", "relation"),
    Panel("dimensions", "Loss of the dimensions", "part of the total loss", "similarity"),
)
"""The parts of the loss, which a run with dimensions logs."""
MEASURES = {
    "mean_average_precision": ("mAP, the mean average precision", "higher"),
    **DISTRIBUTION_TITLES,
    "mean_recall": ("mean recall", "higher"),
    "mean_absolute_error": ("mean absolute error of the dimensions", "lower"),
    "mean_correlation": ("mean correlation of the dimensions", "higher"),
    "mean_ccc": ("mean concordance (CCC) of the dimensions", "higher"),
}
"""Title of each measure of a split, and whether lower or higher is better."""
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
    splits: list[str]
    """The measured splits, as words."""
    measures: list[tuple[str, str, list[tuple[str, str]]]]
    """Title of a measure, whether lower or higher is better, and for each split its value and interval (empty without
    one)."""
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

    learns: str
    """What the classifier learns, such as "6 labels"."""
    charts: list[Chart]
    """The validations, and the parts of the loss."""
    result: Result | None


def read_finetuning(folder: RunFolder, config: Line, history: History) -> Finetuned | None:
    """Reads the results of a run's folder; None for a pretraining run."""
    if not isinstance(config.get("finetune"), dict):
        return None
    try:
        found = read_json(folder.path / "finetune.json")
        whole = found if (found["format"], found["format_version"]) == FORMAT else None
        result, labels = (_result(whole), whole["labels"]) if whole else (None, None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        result, labels = None, None
    charts = [_validation(folder, history), *(draw_metric(panel, history) for panel in PANELS)]
    learns = _describe_outputs(config["finetune"], labels, result)
    return Finetuned(learns, [chart for chart in charts if chart is not None], result)


def _describe_outputs(settings: Line, labels: list[str] | None, result: Result | None) -> str:
    """What is learned, such as "distributions over 7 labels, valence and arousal"; without a result, what the settings
    state."""
    names = labels or settings.get("labels")
    of = "categories" if settings.get("task") == "multi" else "labels"
    text = f"{len(names)} {of}" if isinstance(names, list | tuple) and names else of
    if settings.get("target") == "distribution":
        text = f"distributions over {text}"
    stated = settings.get("dimensions")
    dimensions = [name for name, _, _ in result.dimensions] if result else stated
    if not isinstance(dimensions, list | tuple) or not dimensions:
        return text
    *first, last = [*([text] if settings.get("target") != "dimensions" else []), *map(str, dimensions)]
    return f"{', '.join(first)} and {last}" if first else last


def _validation(folder: RunFolder, history: History) -> Chart | None:
    # For a step that was repeated after a resume, the last line counts.
    lines = {x["step"]: x for x in read_lines(folder.path / "validation.jsonl") if type(x.get("step")) is int}
    if not lines:
        return None
    steps = np.array(sorted(lines))
    values = np.array([number(lines[step].get("value")) for step in steps])
    metric = str(lines[int(steps[-1])].get("metric"))
    title, unit = VALIDATED.get(metric, ("Validation", metric.replace("_", " ")))
    panel = Panel("validation", title, unit, "good")
    return draw_chart(panel, steps, values, history)


def _result(found: dict[str, Any]) -> Result:
    measured = {split: found[split] for split in ("val", "test") if found[split] is not None}
    measures = []
    for name, (title, better) in MEASURES.items():
        values = [(_said(split.get(name)), _interval(split, name)) for split in measured.values()]
        if any(split.get(name) is not None for split in measured.values()):
            is_likely = name != "accuracy" or "kl_divergence" in next(iter(measured.values()))
            measures.append((title if is_likely else "accuracy", better, values))
    split = "test" if found["test"] is not None else "val"
    shown = found[split]
    classes = shown.get("per_class", [])
    columns = [key for key in CLASSES if classes and key in classes[0]]
    return Result(
        best_step=int(found["best_step"]),
        counts=[(name, int(count)) for name, count in found["samples"].items() if count is not None],
        splits=["validation" if split == "val" else split for split in measured],
        measures=measures,
        classes_of=split,
        columns=[CLASSES[key] for key in columns],
        classes=[
            (str(row["label"]), int(row["samples"]), [_said(row[key]) for key in columns]) for row in classes
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
    return "–" if value is None else show(round(float(value), 3) + 0.0)  # -0.0 becomes 0.0
