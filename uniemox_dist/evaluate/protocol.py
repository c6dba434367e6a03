"""The protocol: student beside untrained, teacher and the trivial baselines, with intervals, and a verdict.

Primary: masked error against linear interpolation, caption retrieval in the teacher's text space, cosine to the
teacher beside a ridge from the colour histogram. Secondary: a linear probe on labels. Valence is an illustration.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from uniemox_dist.evaluate.baselines import ridge
from uniemox_dist.evaluate.features import Features, unit
from uniemox_dist.evaluate.metrics import bootstrap, cosines, in_top, masked_errors, probe, trivial_errors
from uniemox_dist.models.student import Student

STUDENT, UNTRAINED, TEACHER = "student", "untrained", "teacher"
TRIVIAL = ("colour histogram", "24x24 pixels")
MIN_VALENCE = 10


@dataclass
class Metric:
    """A column of the table: scores per held-out sample and row; the value is their mean."""

    name: str
    title: str
    better: str
    primary: bool
    note: str
    scores: dict[str, np.ndarray]
    clusters: list[str]
    statistic: Callable[[np.ndarray, np.ndarray], float] | None = None
    """Of scores and numbers of samples, where it is not the mean."""

    def value(self, scores: np.ndarray, draw: np.ndarray) -> float:
        """The statistic of some samples."""
        return self.statistic(scores, draw) if self.statistic else float(scores[draw].mean())


def evaluate(metrics: list[Metric]) -> dict[str, Any]:
    """The table and the verdict, as they go into evaluation.json."""
    return {"metrics": [_rows(metric) for metric in metrics], "verdict": _verdict(metrics)}


def measure(train: Features, test: Features, student: Student, untrained: Student, seed: int) -> list[Metric]:
    """The columns that this student can have."""
    metrics = []
    if student.decoder is not None:
        scores = {
            STUDENT: masked_errors(student, test.scenes, seed),
            UNTRAINED: masked_errors(untrained, test.scenes, seed),
        }
        scores.update(trivial_errors(student, test.scenes, seed))
        note = f"squared error of masked pixels, 0..1, mask ratio {student.model.mask_ratio}"
        metrics.append(Metric("masked_mse", "Masked MSE", "lower", True, note, scores, test.groups))
    in_space = {**test.fused, TEACHER: test.teacher}
    by_ridge = {r: unit(ridge(train.encoder[r], train.texts, train.groups, test.encoder[r])) for r in TRIVIAL}
    scores = {row: in_top(x, test.texts, test.captions) for row, x in {**in_space, **by_ridge}.items()}
    distinct = len(set(test.captions))
    scores["chance"] = np.full(len(test.keys), min(1.0, 10 / distinct))
    note = f"own caption among the 10 nearest of {distinct}; baselines mapped to texts by ridge on the train split"
    metrics.append(Metric("retrieval_r10", "Caption R@10", "higher", True, note, scores, test.groups))
    by_ridge = {r: ridge(train.encoder[r], train.teacher, train.groups, test.encoder[r]) for r in TRIVIAL}
    by_ridge["mean teacher vector"] = np.broadcast_to(train.teacher.mean(0), test.teacher.shape)
    scores = {row: cosines(x, test.teacher) for row, x in {**test.fused, **by_ridge}.items()}
    note = "mean cosine of the fused vector and the teacher's; baselines by ridge on the train split"
    metrics.append(Metric("teacher_cosine", "Cosine to teacher", "higher", True, note, scores, test.groups))
    metrics.append(_probe(train, test))
    metrics.append(_valence(train, test))
    return [metric for metric in metrics if metric.scores]


def _probe(train: Features, test: Features) -> Metric:
    known = [i for i, label in enumerate(train.labels) if label is not None]
    held = [i for i, label in enumerate(test.labels) if label is not None]
    labels = [str(train.labels[i]) for i in known]
    groups = [train.groups[i] for i in known]
    scores = {}
    if len(set(labels)) > 1 and held:
        wanted = [str(test.labels[i]) for i in held]
        for row in (STUDENT, UNTRAINED, TEACHER, *TRIVIAL):
            scores[row] = probe(train.encoder[row][known], labels, groups, test.encoder[row][held], wanted)
        common = max(set(labels), key=labels.count)
        scores["most common label"] = np.array([float(label == common) for label in wanted])
    note = f"accuracy over {len(set(labels))} labels; encoder's class token, before fusion"
    return Metric(
        "linear_probe", "Linear probe", "higher", False, note, scores, [test.groups[i] for i in held]
    )


def _valence(train: Features, test: Features) -> Metric:
    known, held = ~np.isnan(train.valence), ~np.isnan(test.valence)
    groups = [g for g, k in zip(train.groups, known) if k]
    truth = test.valence[held]
    scores = {}
    if known.sum() >= MIN_VALENCE and held.sum() >= MIN_VALENCE:
        for row in (STUDENT, UNTRAINED, TEACHER, *TRIVIAL):
            x, x_new = train.encoder[row][known], test.encoder[row][held]
            scores[row] = ridge(x, train.valence[known][:, None], groups, x_new)[:, 0]
    note = f"an illustration only, n = {int(held.sum())}: Pearson correlation of a ridge from the features"
    clusters = [g for g, h in zip(test.groups, held) if h]
    return Metric(
        "valence",
        "Valence",
        "higher",
        False,
        note,
        scores,
        clusters,
        lambda s, draw: _pearson(s[draw], truth[draw]),
    )


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() < 1e-12 or b.std() < 1e-12:
        return 0.0  # a constant answer explains nothing
    return float(np.corrcoef(a, b)[0, 1])


def scores(metrics: list[Metric]) -> list[dict[str, Any]]:
    """The scores behind the table, of every metric that is a mean of them."""
    return [
        {
            "name": metric.name,
            "title": metric.title,
            "better": metric.better,
            "primary": metric.primary,
            "note": metric.note,
            "clusters": metric.clusters,
            "rows": {row: [round(float(x), 6) for x in values] for row, values in metric.scores.items()},
        }
        for metric in metrics
        if metric.statistic is None
    ]


def _rows(metric: Metric) -> dict[str, Any]:
    interval = bootstrap(metric.clusters)
    rows = []
    for row, scores in metric.scores.items():
        everything = np.arange(len(scores))
        low, high = interval(lambda draw, s=scores: metric.value(s, draw))  # type: ignore[misc]
        value = metric.value(scores, everything)
        rows.append({"row": row, "value": round(value, 5), "low": round(low, 5), "high": round(high, 5)})
    facts = {"name": metric.name, "title": metric.title, "better": metric.better, "primary": metric.primary}
    return {**facts, "n": len(metric.clusters), "note": metric.note, "rows": rows}


def _verdict(metrics: list[Metric]) -> list[str]:
    """What was beaten and what was not, by the interval of the paired difference."""
    sentences = []
    for metric in metrics:
        if STUDENT not in metric.scores:
            continue
        interval = bootstrap(metric.clusters)
        sign = 1 if metric.better == "higher" else -1
        beaten: list[str] = []
        open_: list[str] = []
        behind: list[str] = []
        for row, scores in metric.scores.items():
            if row == STUDENT:
                continue
            student = metric.scores[STUDENT]
            low, high = interval(
                lambda d, s=scores, m=metric: sign * (m.value(student, d) - m.value(s, d))  # type: ignore[misc]  # noqa: B023
            )
            (beaten if low > 0 else behind if high < 0 else open_).append(row)
        parts = [
            f"clearly better than {_and(beaten)}" if beaten else "",
            f"not distinguishable from {_and(open_)}" if open_ else "",
            f"worse than {_and(behind)}" if behind else "",
        ]
        kind = "" if metric.primary else " (secondary)"
        sentences.append(f"{metric.title}{kind}: the student is {'; '.join(p for p in parts if p)}.")
    lost = [s.partition(":")[0] for s in sentences if "not distinguishable" in s or "worse than" in s]
    where = (
        f"Not every row was beaten in: {', '.join(lost)}."
        if lost
        else "Every row was beaten in every metric."
    )
    sentences.append(where)
    return sentences


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
