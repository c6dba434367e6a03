"""Metrics of classification, retrieval and regression, for releases and for fine-tuned classifiers. Needs numpy only.

Shape legend: n samples, C classes or categories, V dimensions, Q queries, A answers, E width of a space.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from uniemox_dist.evaluate.intervals import Bootstrap, bounds

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


def multi_label(answers_nC: np.ndarray, targets_nC: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Returns the average precision of each category and their mean (mAP, over categories that occur)."""
    rows: list[dict[str, Any]] = [
        {
            "label": label,
            "samples": int(targets_nC[:, i].sum()),
            "average_precision": average_precision(answers_nC[:, i], targets_nC[:, i] > 0.5),
        }
        for i, label in enumerate(labels)
    ]
    return {
        "samples": len(answers_nC),
        "mean_average_precision": _mean_of_known([row["average_precision"] for row in rows]),
        "per_class": rows,
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


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# ---- distributions over labels

LEAST_SHARE = 1e-12
"""Smaller estimated shares count as this one in the Kullback-Leibler divergence, which would be infinite for 0."""


def softmax(logits_nC: np.ndarray) -> np.ndarray:
    """The estimated distributions of logits, in float64."""
    grown_nC = np.exp(logits_nC.astype(np.float64) - logits_nC.max(1, keepdims=True))
    found: np.ndarray = grown_nC / grown_nC.sum(1, keepdims=True)
    return found


def distribution_scores(found_nC: np.ndarray, true_nC: np.ndarray) -> dict[str, np.ndarray]:
    """The six usual measures of label distribution learning for each sample, n. Rows of both arrays sum to 1.

    Source: X. Geng, "Label Distribution Learning", TKDE 28, 2016. With zeros: labels with a share of 0 on both
    sides count 0 in Clark and Canberra, and 1 if one side is 0, as the formulas say; 0 · ln(0 / x) is 0.
    """
    gap_nC, sum_nC = np.abs(found_nC - true_nC), found_nC + true_nC
    relative_nC = gap_nC / np.where(sum_nC > 0, sum_nC, 1.0)
    ratio_nC = np.where(true_nC > 0, true_nC, 1.0) / np.maximum(found_nC, LEAST_SHARE)
    return {
        "chebyshev": gap_nC.max(1),
        "clark": np.sqrt(np.square(relative_nC).sum(1)),
        "canberra": relative_nC.sum(1),
        "kl_divergence": (true_nC * np.log(ratio_nC)).sum(1),
        "cosine": cosines(found_nC, true_nC),
        "intersection": np.minimum(found_nC, true_nC).sum(1),
    }


def label_distribution(
    logits_nC: np.ndarray,
    true_nC: np.ndarray,
    labels: Sequence[str],
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The means of `distribution_scores` for the softmax of logits, and `single_label` of the most likely label; each
    with its 95 % interval. If several labels have the largest true share, each of them is right.

    Args:
        groups: the group of look-alikes of each sample; by default each sample is its own group.
    """
    found_nC, true_nC = softmax(logits_nC), true_nC.astype(np.float64)
    scores = distribution_scores(found_nC, true_nC)
    bootstrap = Bootstrap(groups or [str(i) for i in range(len(found_nC))])
    intervals = bootstrap.means(np.stack(list(scores.values())))
    answers_n, rows = found_nC.argmax(1), np.arange(len(found_nC))
    is_right_n = true_nC[rows, answers_n] == true_nC.max(1)
    likely_nC = np.eye(len(labels))[np.where(is_right_n, answers_n, true_nC.argmax(1))]
    of_labels = single_label(found_nC, likely_nC, labels, groups)
    shares = zip(of_labels["per_class"], true_nC.mean(0), found_nC.mean(0))
    return {
        "samples": len(found_nC),
        **{name: float(score_n.mean()) for name, score_n in scores.items()},
        **{f"{name}_interval": list(interval) for name, interval in zip(scores, intervals)},
        **of_labels,
        "per_class": [
            {**row, "mean_share": float(true), "mean_estimate": float(found)} for row, true, found in shares
        ],
    }


# ---- dimensions


def dimensions(
    found_nV: np.ndarray,
    true_nV: np.ndarray,
    names: Sequence[str],
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The mean absolute error, Pearson's correlation and the concordance of each dimension, over samples where it is
    known (not NaN), on the scale of the data, with their 95 % intervals; and their means over the dimensions.

    A value is None if it is not defined: all of them without samples, the correlation if either side is constant, and
    the concordance if the truth is constant.

    Args:
        groups: samples that are resampled together; by default each sample is its own group.
    """
    groups = groups or [str(i) for i in range(len(found_nV))]
    rows = [
        {"dimension": name, **_dimension(found_nV[:, i], true_nV[:, i], groups)}
        for i, name in enumerate(names)
    ]
    means = {f"mean_{name}": _mean_of_known([row[name] for row in rows]) for name in ("correlation", "ccc")}
    error = _mean_of_known([row["mean_absolute_error"] for row in rows])
    return {"dimensions": rows, "mean_absolute_error": error, **means}


def _dimension(found_n: np.ndarray, true_n: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    known_n = np.isfinite(true_n)
    found, true = found_n[known_n].astype(np.float64), true_n[known_n].astype(np.float64)
    names = ("mean_absolute_error", "correlation", "ccc")
    if not len(true):
        return {"samples": 0, **dict.fromkeys(names), **{f"{name}_interval": None for name in names}}
    # Moments of centred values lose fewer digits.
    x, y = found - found.mean(), true - true.mean()
    moments_nK = np.stack([np.abs(found - true), x, y, x * x, y * y, x * y], axis=1)
    shift = float(found.mean() - true.mean())
    values = _dimension_values(moments_nK.mean(0), shift)
    own = [group for group, known in zip(groups, known_n) if known]
    resampled = _dimension_values(Bootstrap(own).moments(moments_nK).T, shift)
    return {
        "samples": len(true),
        **{name: None if np.isnan(value) else float(value) for name, value in zip(names, values)},
        **{
            f"{name}_interval": None if np.isnan(value) else list(bounds(some))
            for name, value, some in zip(names, values, resampled)
        },
    }


def _dimension_values(moments_K: np.ndarray, shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Error, correlation and concordance from means of |x - y|, x, y, x², y² and xy; NaN where they are not defined.

    The concordance correlation coefficient is 2 s_xy / (s_x² + s_y² + (m_x - m_y)²), with variances over n. Source: L.
    Lin, "A concordance correlation coefficient to evaluate reproducibility", Biometrics 45, 1989.

    Args:
        moments_K: 6 values, or 6×R for several resamples.
        shift: what must be added to mean(x) - mean(y), since both were centred.
    """
    error, x, y, xx, yy, xy = moments_K
    least = 1e-12 * np.maximum(xx + yy, 1e-300)  # float noise of a constant
    var_x, var_y = xx - x * x, yy - y * y
    var_x, var_y = np.where(var_x > least, var_x, 0.0), np.where(var_y > least, var_y, 0.0)
    covariance = xy - x * y
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = np.where((var_x > 0) & (var_y > 0), covariance / np.sqrt(var_x * var_y), np.nan)
        ccc = np.where(var_y > 0, 2 * covariance / (var_x + var_y + np.square(x - y + shift)), np.nan)
    return error, np.clip(correlation, -1, 1), ccc


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
