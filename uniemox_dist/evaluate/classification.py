"""What answers are worth: accuracy with its interval, figures of each class, the confusion of classes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def confusion(truth: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """C×C counts: rows are true classes, columns answers."""
    found: np.ndarray = np.bincount(truth * classes + answers, minlength=classes**2).reshape(classes, classes)
    return found


def per_class(counts_CC: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each class; those without a sample have no recall and no F1, those never
    answered a precision of 0."""
    rows = []
    for i, name in enumerate(names):
        right, support, given = int(counts_CC[i, i]), int(counts_CC[i].sum()), int(counts_CC[:, i].sum())
        precision = right / given if given else 0.0
        recall = right / support if support else None
        f1 = None if recall is None else 2 * right / (support + given)
        rows.append({"label": name, "precision": precision, "recall": recall, "f1": f1, "support": support})
    return rows


def summary(
    truth: np.ndarray,
    answers: np.ndarray,
    names: Sequence[str],
    interval: Callable[[Callable[[np.ndarray], float]], tuple[float, float]],
) -> dict[str, Any]:
    """Accuracy with its 95 % interval, macro F1 and mean recall over the classes that are there, and each class."""
    hits = (truth == answers).astype(np.float64)
    low, high = interval(lambda draw: float(hits[draw].mean()))
    counts = confusion(truth, answers, len(names))
    classes = per_class(counts, names)
    there = [row for row in classes if row["support"]]
    return {
        "accuracy": float(hits.mean()),
        "low": low,
        "high": high,
        "macro_f1": float(np.mean([row["f1"] for row in there])),
        "mean_recall": float(np.mean([row["recall"] for row in there])),
        "classes": classes,
        "confusion": counts.tolist(),
    }
