"""Quality of predictions: accuracy, recall and precision of each class, average precision, and errors of dimensions.

Shape legend: n samples, C classes or categories, V dimensions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000


def single_label(answers_nC: np.ndarray, targets_nC: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its 95 % bootstrap interval over samples, the mean recall of the classes, and a row for each class;
    None where a value is undefined."""
    found_n, true_n = answers_nC.argmax(1), targets_nC.argmax(1)
    hits_n = found_n == true_n
    low, high = _interval(hits_n)
    rows: list[dict[str, Any]] = []
    for number, label in enumerate(labels):
        of_class, named = true_n == number, found_n == number
        right = int((of_class & named).sum())
        rows.append(
            {
                "label": label,
                "samples": int(of_class.sum()),
                "recall": _ratio(right, int(of_class.sum())),
                "precision": _ratio(right, int(named.sum())),
            }
        )
    recalls = [row["recall"] for row in rows if row["recall"] is not None]
    return {
        "samples": len(hits_n),
        "accuracy": float(hits_n.mean()),
        "accuracy_interval": [low, high],
        "mean_recall": float(np.mean(recalls)),
        "per_class": rows,
    }


def multi_label(
    answers_nC: np.ndarray, targets_nC: np.ndarray, labels: Sequence[str], dimensions: Sequence[str]
) -> dict[str, Any]:
    """Average precision of each category and their mean (mAP, over categories that occur); mean absolute error and
    Pearson's correlation of each dimension, over samples where it is known. Dimensions are the last columns of both
    arrays, on the scale of the data."""
    first = len(labels)
    rows: list[dict[str, Any]] = [
        {
            "label": label,
            "samples": int(targets_nC[:, i].sum()),
            "average_precision": average_precision(answers_nC[:, i], targets_nC[:, i] > 0.5),
        }
        for i, label in enumerate(labels)
    ]
    known = [row["average_precision"] for row in rows if row["average_precision"] is not None]
    found: dict[str, Any] = {
        "samples": len(answers_nC),
        "mean_average_precision": float(np.mean(known)) if known else None,
        "per_class": rows,
        "dimensions": [
            {"dimension": name, **_dimension(answers_nC[:, first + i], targets_nC[:, first + i])}
            for i, name in enumerate(dimensions)
        ],
    }
    errors = [row["mean_absolute_error"] for row in found["dimensions"]]
    found["mean_absolute_error"] = (
        float(np.mean([e for e in errors if e is not None])) if any(e is not None for e in errors) else None
    )
    return found


def average_precision(scores_n: np.ndarray, is_n: np.ndarray) -> float | None:
    """Σ (R_k − R_{k−1}) P_k over falling thresholds, equal scores together; None if there is no positive sample."""
    if not is_n.any():
        return None
    order = np.argsort(-scores_n, kind="stable")
    hits = np.cumsum(is_n[order])
    last = np.append(np.flatnonzero(np.diff(scores_n[order])), len(order) - 1)
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def _dimension(found_n: np.ndarray, true_n: np.ndarray) -> dict[str, Any]:
    known = np.isfinite(true_n)
    found, true = found_n[known].astype(np.float64), true_n[known].astype(np.float64)
    varies = len(true) > 1 and found.std() > 0 and true.std() > 0
    return {
        "samples": int(known.sum()),
        "mean_absolute_error": float(np.abs(found - true).mean()) if len(true) else None,
        "correlation": float(np.corrcoef(found, true)[0, 1]) if varies else None,
    }


def _interval(hits_n: np.ndarray) -> tuple[float, float]:
    # Drawing n samples with replacement and counting hits is a binomial draw.
    counts = np.random.RandomState(0).binomial(len(hits_n), hits_n.mean(), RESAMPLES)
    low, high = np.percentile(counts / len(hits_n), [2.5, 97.5])
    return float(low), float(high)


def _ratio(part: int, of: int) -> float | None:
    return part / of if of else None
