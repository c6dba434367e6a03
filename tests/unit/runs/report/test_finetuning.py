"""The report of a fine-tuning run: its validations, the scores of the best weights, and no section of pretraining."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from uniemox_dist.cli.main import run
from uniemox_dist.runs.folder import RunFolder

SINGLE = {
    "samples": 4,
    "accuracy": 0.75,
    "accuracy_interval": [0.25, 1.0],
    "mean_recall": 0.8125,
    "per_class": [
        {"label": "awe", "samples": 3, "recall": 0.6667, "precision": 1.0},
        {"label": "<fear>", "samples": 0, "recall": None, "precision": 0.0},
    ],
}
MULTI = {
    "samples": 4,
    "mean_average_precision": 0.3125,
    "mean_absolute_error": 1.25,
    "per_class": [{"label": "Esteem", "samples": 2, "average_precision": 0.3125}],
    "dimensions": [{"dimension": "valence", "samples": 4, "mean_absolute_error": 1.25, "correlation": None}],
}
"""As it was written before the concordance and intervals."""
SHARES = {
    **SINGLE,
    "kl_divergence": 0.4375,
    "kl_divergence_interval": [0.25, 0.5],
    "cosine": 0.9,
    "per_class": [{**row, "mean_share": 0.6, "mean_estimate": 0.55} for row in SINGLE["per_class"]],  # type: ignore[attr-defined]
    "dimensions": [
        {
            "dimension": "valence",
            "samples": 4,
            "mean_absolute_error": 1.25,
            "mean_absolute_error_interval": [1.0, 1.5],
            "correlation": 0.5,
            "correlation_interval": None,
            "ccc": 0.25,
            "ccc_interval": [0.125, 0.375],
        }
    ],
    "mean_absolute_error": 1.25,
    "mean_correlation": 0.5,
    "mean_ccc": 0.25,
}


def page_of(folder: Path, result: Any, metric: str = "accuracy", parts: tuple[str, ...] = ()) -> str:
    made = RunFolder(folder)
    made.create()
    made.config.write_text(
        "run: {name: fine, max_steps: 20}\ndata: {path: DATA}\nfinetune: {task: single}\n"
        "model: {image_size: 32, patch_size: 8, width: 32, depth: 2}\n"
    )
    made.metrics.write_text(
        "".join(
            json.dumps({"step": s, "loss": 2 / s, "time": s, **dict.fromkeys(parts, 1 / s)}) + "\n"
            for s in (10, 20)
        )
    )
    looks = [{"step": s, "metric": metric, "value": v} for s, v in ((10, 0.5), (20, 0.4), (10, 0.6))]
    (folder / "validation.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    (folder / "finetune.json").write_text(result if isinstance(result, str) else json.dumps(result))
    assert run(["report", str(folder)]) == 0
    return (folder / "report.html").read_text()


def measures(page: str) -> dict[str, list[str]]:
    """The table of measures: its first cells, and the others of each row."""
    table = page[page.index("<th>Measure</th>") : page.index("<th>Label ")]
    rows = re.findall(r"<th[^>]*>(.*?)</th>(.*?)</tr>", table)
    texts = [[title, *re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", cells)] for title, cells in rows]
    plain = [[re.sub(r"<[^>]+>", " ", text).strip() for text in row] for row in texts]
    return {"" if title == "Measure" else title: cells for title, *cells in plain}


def result_of(val: Any, test: Any) -> dict[str, Any]:
    samples = {"train": 1500, "val": 4, "test": 4 if test else None}
    about = {"format": "uniemox-finetune", "format_version": 1, "labels": ["awe", "<fear>"], "best_step": 10}
    return {**about, "samples": samples, "remarks": ["a class & its lack"], "val": val, "test": test}


def test_one_label_a_picture(tmp_path: Path) -> None:
    page = page_of(tmp_path / "fine", result_of({**SINGLE, "accuracy": 0.6}, SINGLE))
    assert "UniEmoX fine-tuning run" in page
    assert "learns 2 labels" in page
    assert "those of step 10" in page
    assert "1,500 training, 4 validation, 4 test samples" in page
    assert measures(page) == {
        "": ["Validation", "Test"],
        "Accuracy higher is better": ["0.6 0.25 – 1", "0.75 0.25 – 1"],
        "Mean recall higher is better": ["0.812", "0.812"],
    }
    assert "largest share" not in page
    assert "Loss of the" not in page
    assert '<th scope="row">awe</th><td>3</td><td>0.667</td><td>1</td>' in page
    assert '<th scope="row">&lt;fear&gt;</th><td>0</td><td>–</td><td>0</td>' in page
    assert "a class &amp; its lack" in page
    assert "Validation accuracy" in page
    assert "between 0.4 and 0.6 (accuracy), latest 0.4" in page  # a step's last line counts
    for text in ("Reconstructions", "No pictures yet", "three losses", "uniemox release", "pretraining"):
        assert text not in page


def test_several_labels_and_dimensions_without_a_test_split(tmp_path: Path) -> None:
    page = page_of(tmp_path / "fine", result_of(MULTI, None), "mean_average_precision")
    assert measures(page) == {
        "": ["Validation"],
        "mAP, the mean average precision higher is better": ["0.312"],
        "Mean absolute error of the dimensions lower is better": ["1.25"],
    }
    assert "learns 2 labels and valence" in page
    assert "Label <small>validation split</small>" in page
    assert '<th scope="row">Esteem</th><td>2</td><td>0.312</td>' in page
    assert '<th scope="row">valence</th><td>4</td><td>1.25</td><td>–</td><td>–</td>' in page
    assert "Validation mAP" in page


def test_distributions_and_dimensions_with_intervals(tmp_path: Path) -> None:
    parts = ("labels", "dimensions")
    page = page_of(tmp_path / "fine", result_of(SHARES, SHARES), "kl_divergence", parts)
    titles = ["Total loss", "Validation KL divergence", "Loss of the labels", "Loss of the dimensions"]
    assert re.findall(r"<figcaption><h3>([^<]+)</h3>", page) == titles
    found = measures(page)
    assert found.pop("") == ["Validation", "Test"]
    assert {name: test for name, (_, test) in found.items()} == {
        "KL divergence lower is better": "0.438 0.25 – 0.5",
        "Cosine higher is better": "0.9",
        "Accuracy of the most likely label higher is better": "0.75 0.25 – 1",
        "Mean recall higher is better": "0.812",
        "Mean absolute error of the dimensions lower is better": "1.25",
        "Mean correlation of the dimensions higher is better": "0.5",
        "Mean concordance (CCC) of the dimensions higher is better": "0.25",
    }
    for text in (
        "Samples, recall and precision count a sample under the label with its largest share",
        "Over the steps between 0.4 and 0.6 (KL divergence)",
        '<th scope="row">awe</th><td>3</td><td>0.667</td><td>1</td><td>0.6</td><td>0.55</td>',
        '<th scope="row">valence</th><td>4</td><td>1.25 (1 – 1.5)</td><td>0.5</td><td>0.25 (0.125 – 0.375)</td>',
        "Validation KL divergence",
    ):
        assert text in page, text


@pytest.mark.parametrize("result", ["", "[]", '{"format": "uniemox-finetune", "format_version": 2}'])
def test_a_missing_result_is_left_out(tmp_path: Path, result: str) -> None:
    page = page_of(tmp_path / "fine", result)
    assert "UniEmoX fine-tuning run" in page
    assert 'id="result"' not in page
    assert "Validation accuracy" in page
