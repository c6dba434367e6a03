"""Metrics of classification, retrieval and regression, for releases and for fine-tuned classifiers. Needs numpy only.

Shape legend: n samples, C classes or categories, V dimensions, Q queries, A answers, E width of a space.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from uniemox_dist.evaluate.intervals import Bootstrap

CHUNK = 512
"""Queries that are ranked at a time."""


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; rows of zeros stay zeros."""
    lengths: np.ndarray = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(lengths, 1e-12)


def cosines(a_nE: np.ndarray, b_nE: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows, n."""
    lengths = np.linalg.norm(a_nE, axis=1) * np.linalg.norm(b_nE, axis=1)
    return (a_nE * b_nE).sum(1) / np.maximum(lengths, 1e-12)


def pearson(a_n: np.ndarray, b_n: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    if a_n.std() < 1e-12 or b_n.std() < 1e-12:
        return 0.0
    return float(np.corrcoef(a_n, b_n)[0, 1])


# ---- classification


def confusion_matrix(truth_n: np.ndarray, answers_n: np.ndarray, classes: int) -> np.ndarray:
    """C×C counts: rows are true classes, columns are answers."""
    found: np.ndarray = np.bincount(truth_n * classes + answers_n, minlength=classes**2)
    return found.reshape(classes, classes)


def per_class(counts_CC: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each class. A class without samples has no recall and no F1 (None); a class
    that was never answered has precision 0, as in scikit-learn."""
    rows = []
    for i, name in enumerate(names):
        right, support, answered = int(counts_CC[i, i]), int(counts_CC[i].sum()), int(counts_CC[:, i].sum())
        precision = right / answered if answered else 0.0
        recall = right / support if support else None
        f1 = None if recall is None else 2 * right / (support + answered)
        rows.append({"label": name, "precision": precision, "recall": recall, "f1": f1, "support": support})
    return rows


def classification(
    truth_n: np.ndarray, answers_n: np.ndarray, names: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Accuracy with its 95 % interval, macro F1 and mean recall over the classes that occur, and `per_class`."""
    hits_n = (truth_n == answers_n).astype(np.float64)
    low, high = bootstrap.mean(hits_n)
    counts_CC = confusion_matrix(truth_n, answers_n, len(names))
    classes = per_class(counts_CC, names)
    occurring = [row for row in classes if row["support"]]
    return {
        "accuracy": float(hits_n.mean()),
        "low": low,
        "high": high,
        "macro_f1": float(np.mean([row["f1"] for row in occurring])),
        "mean_recall": float(np.mean([row["recall"] for row in occurring])),
        "classes": classes,
        "confusion": counts_CC.tolist(),
    }


def single_label(
    answers_nC: np.ndarray,
    targets_nC: np.ndarray,
    labels: Sequence[str],
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """`classification` of scores against one-hot targets, under the keys of finetune.json. The precision of a class
    that was never answered is None.

    Args:
        groups: the group of look-alikes of each sample; by default each sample is its own group.
    """
    bootstrap = Bootstrap(groups or [str(i) for i in range(len(answers_nC))])
    found = classification(targets_nC.argmax(1), answers_nC.argmax(1), labels, bootstrap)
    answered = np.array(found["confusion"]).sum(0)
    return {
        "samples": len(answers_nC),
        "accuracy": found["accuracy"],
        "accuracy_interval": [found["low"], found["high"]],
        "mean_recall": found["mean_recall"],
        "per_class": [
            {
                "label": row["label"],
                "samples": row["support"],
                "recall": row["recall"],
                "precision": row["precision"] if answered[i] else None,
            }
            for i, row in enumerate(found["classes"])
        ],
    }


def multi_label(
    answers_nC: np.ndarray, targets_nC: np.ndarray, labels: Sequence[str], dimensions: Sequence[str]
) -> dict[str, Any]:
    """Returns the average precision of each category and their mean (mAP, over categories that occur), and the mean
    absolute error and Pearson's correlation of each dimension, over samples where it is known (not NaN).

    The columns of both arrays are the categories followed by the dimensions, on the scale of the data.
    """
    first = len(labels)
    rows: list[dict[str, Any]] = [
        {
            "label": label,
            "samples": int(targets_nC[:, i].sum()),
            "average_precision": average_precision(answers_nC[:, i], targets_nC[:, i] > 0.5),
        }
        for i, label in enumerate(labels)
    ]
    by_dimension = [
        {"dimension": name, **_dimension(answers_nC[:, first + i], targets_nC[:, first + i])}
        for i, name in enumerate(dimensions)
    ]
    return {
        "samples": len(answers_nC),
        "mean_average_precision": _mean_of_known([row["average_precision"] for row in rows]),
        "per_class": rows,
        "dimensions": by_dimension,
        "mean_absolute_error": _mean_of_known([row["mean_absolute_error"] for row in by_dimension]),
    }


def average_precision(scores_n: np.ndarray, positive_n: np.ndarray) -> float | None:
    """Σ (R_k − R_{k−1}) P_k over falling thresholds; samples of equal score share one. None if none is positive."""
    if not positive_n.any():
        return None
    order = np.argsort(-scores_n, kind="stable")
    hits = np.cumsum(positive_n[order])
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


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# ---- retrieval


def distinct_captions(
    captions: Sequence[Sequence[str]],
) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Returns all distinct captions, sorted; the indices of each picture's captions; and the pictures of each
    caption."""
    texts = sorted({text for own in captions for text in own})
    number = {text: i for i, text in enumerate(texts)}
    of_pictures = [[number[text] for text in own] for own in captions]
    of_texts: list[list[int]] = [[] for _ in texts]
    for picture, own in enumerate(of_pictures):
        for text in own:
            of_texts[text].append(picture)
    return texts, of_pictures, of_texts


def retrieval_ranks(
    queries_QE: np.ndarray, answers_AE: np.ndarray, own: Sequence[Sequence[int]]
) -> np.ndarray:
    """Returns, for each query, the rank (from 0) of its best right answer among the wrong answers.

    Half of the wrong answers with equal similarity count as before it, so that a constant vector does not win by
    order.

    Args:
        own: for each query the indices of the right answers.
    """
    ranks = np.empty(len(queries_QE))
    for start in range(0, len(queries_QE), CHUNK):
        similarity = queries_QE[start : start + CHUNK].astype(np.float32) @ answers_AE.astype(np.float32).T
        mine = np.zeros(similarity.shape, bool)
        for row, answers in zip(mine, own[start : start + CHUNK]):
            row[list(answers)] = True
        best = np.where(mine, similarity, -np.inf).max(1)[:, None]
        before = ((similarity > best) & ~mine).sum(1) + ((similarity == best) & ~mine).sum(1) / 2
        ranks[start : start + CHUNK] = before
    return ranks
