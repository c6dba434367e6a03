"""`uniemox evaluate protocol`: compares a student with an untrained one, its teacher and trivial baselines.

Primary metrics are the masked error, caption retrieval in the teacher's text space, and the cosine to the teacher. A
linear probe on labels is secondary. Valence is an illustration.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import write_json
from uniemox_dist.data.evaluation_batches import EvaluationBatch
from uniemox_dist.evaluate.embedding_pass import Split, embed_splits
from uniemox_dist.evaluate.inputs import check_group_attribute, open_splits
from uniemox_dist.evaluate.intervals import RESAMPLES, Bootstrap
from uniemox_dist.evaluate.metrics import cosines, distinct_captions, pearson, retrieval_ranks, unit
from uniemox_dist.evaluate.probes import PENALTIES, cross_validate, logistic_regression, ridge
from uniemox_dist.evaluate.subject import (
    BASELINES,
    HISTOGRAM,
    PIXELS,
    RELEASE,
    TEACHER,
    Measured,
    ReleaseSubject,
    Rows,
)
from uniemox_dist.evaluate.tasks import COMMON, embed_texts, read_numbers
from uniemox_dist.release.format import read_release
from uniemox_dist.teacher.model import Teacher

STUDENT = "student"
TITLES = {RELEASE: STUDENT, HISTOGRAM: "colour histogram", PIXELS: "24x24 pixels"}
"""Names of rows in the protocol's table where they differ from the tasks'."""
TOP = 10
MIN_VALENCE = 10
"""Smallest number of samples with a valence, in each split, for the valence metric."""


@dataclass
class Metric:
    """One metric: scores per held-out sample and row, whose mean is the value."""

    name: str
    title: str
    better: str
    """Which values are better: higher or lower."""
    primary: bool
    note: str
    scores: dict[str, np.ndarray]
    clusters: list[str]
    statistic: Callable[[np.ndarray, np.ndarray], float] | None = None
    """A function of scores and sample numbers, if the value is not the mean of the scores."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further entries of a row."""

    def value(self, scores: np.ndarray) -> float:
        """The value of one row."""
        return self.statistic(scores, np.arange(len(scores))) if self.statistic else float(scores.mean())

    def interval(self, bootstrap: Bootstrap, scores: np.ndarray) -> tuple[float, float]:
        """The 95 % interval of one row."""
        if (value := self.statistic) is None:
            return bootstrap.mean(scores)
        return bootstrap.statistic(lambda drawn: value(scores, drawn))

    def gain(self, bootstrap: Bootstrap, scores: np.ndarray) -> tuple[float, float]:
        """The 95 % interval of the difference between the student and a row, positive if the student is better; paired
        by sample."""
        sign = 1 if self.better == "higher" else -1
        student = self.scores[STUDENT]
        if (value := self.statistic) is None:
            return bootstrap.mean(sign * (student - scores))
        return bootstrap.statistic(lambda drawn: sign * (value(student, drawn) - value(scores, drawn)))


def run(
    release: Path,
    data: str,
    *,
    splits: dict[str, str | None],
    teacher_name: str | None = None,
    group_by: str | None = None,
    valence: str = "polarity",
    scores_file: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """Measures a release; returns the content of evaluation.json.

    Args:
        splits: folders of `train`, which baselines and probes learn from, and `test` below DATA.
        group_by, valence: attributes of samples; see `embed_splits` and `measure`.
        scores_file: receives the scores of every held-out picture, for intervals over several releases.
        workers: processes that decode pictures.

    Raises:
        UserError: for a release without a teacher, a teacher other than that of its training, or missing data.
    """
    if read_release(release)["teacher"] is None:
        raise UserError(
            f"RELEASE={release}: was trained without a teacher, which the protocol compares with; use knn or probe"
        )
    readers = open_splits(data, splits, ("train", "test"))
    check_group_attribute(readers, group_by)
    subject = ReleaseSubject(release, BASELINES, teacher_name=teacher_name, device=device)

    def embed(role: str, batch: EvaluationBatch) -> Rows:
        return subject.embed(batch, in_space=True, masked=role == "test")

    found = embed_splits(readers, subject.settings, embed, group_by=group_by, workers=workers)
    assert subject.teacher is not None
    mask_ratio = subject.student.model.mask_ratio
    metrics = measure(found["train"], found["test"], subject.teacher, valence, mask_ratio)
    if scores_file is not None:
        about = {"format": "uniemox-scores", "format_version": 1, "release": str(release)}
        write_json(scores_file, {**about, "metrics": list_scores(metrics)})
    return {
        "format": "uniemox-evaluation",
        "format_version": 1,
        "release": str(release),
        "step": subject.facts["step"],
        "data": {role: split.facts for role, split in found.items()},
        "bootstrap": {"resamples": RESAMPLES, "unit": group_by or "picture", "confidence": 0.95},
        **summarise(metrics),
    }


def measure(train: Split, test: Split, teacher: Teacher, valence: str, mask_ratio: float) -> list[Metric]:
    """Returns the metrics that this student and these splits allow. `valence` names the attribute with a sample's
    valence."""
    metrics = [
        _masked_mse(test, mask_ratio),
        _retrieval(train, test, teacher),
        _teacher_cosine(train, test),
        _linear_probe(train, test),
        _valence(train, test, valence),
    ]
    return [metric for metric in metrics if metric.scores]


def summarise(metrics: list[Metric]) -> dict[str, Any]:
    """The table and the verdict as the content of evaluation.json."""
    return {"metrics": [_table(metric) for metric in metrics], "verdict": _verdict(metrics)}


def list_scores(metrics: list[Metric]) -> list[dict[str, Any]]:
    """The scores behind the table, for every metric that is a mean of scores."""
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


def print_table(result: dict[str, Any]) -> None:
    """Prints the table and the verdict."""
    order = [_title(row) for row in (RELEASE, *BASELINES)]
    place = {name: i for i, name in enumerate(order)}
    for metric in result["metrics"]:
        kind = "" if metric["primary"] else ", secondary"
        click.echo(f"\n{metric['title']} ({metric['better']} is better{kind}): {metric['note']}")
        for row in sorted(metric["rows"], key=lambda r: place.get(r["row"], len(place))):
            chosen = f"   penalty={row['penalty']:g}" if "penalty" in row else ""
            click.echo(
                f"  {row['row']:24s} {row['value']:7.4f}   [{row['low']:.4f}, {row['high']:.4f}]{chosen}"
            )
    click.echo("")
    for sentence in result["verdict"]:
        click.echo(sentence)


def _title(row: str) -> str:
    return TITLES.get(row, row)


def _titled(rows: Measured) -> dict[str, np.ndarray]:
    return {_title(row): values for row, values in rows.items()}


def _masked_mse(test: Split, mask_ratio: float) -> Metric:
    note = f"squared error of masked pixels, 0..1, mask ratio {mask_ratio}"
    scores = _titled(test.rows.masked_errors)
    return Metric("masked_mse", "Masked MSE", "lower", True, note, scores, test.groups)


def _retrieval(train: Split, test: Split, teacher: Teacher) -> Metric:
    """Scores, for each picture with captions, whether one of its captions is among the 10 nearest. Trivial rows are
    mapped to the first captions of the training split."""
    known = [i for i, own in enumerate(train.captions) if own]
    held = [i for i, own in enumerate(test.captions) if own]
    texts, of_pictures, _ = distinct_captions([test.captions[i] for i in held])
    scores: dict[str, np.ndarray] = {}
    if known and held:
        texts_TE = embed_texts(teacher, texts)
        targets = embed_texts(teacher, [train.captions[i][0] for i in known])
        groups = [train.groups[i] for i in known]
        vectors = {row: x[held] for row, x in test.rows.in_space.items()}
        for row in (HISTOGRAM, PIXELS):
            x, new = train.rows.features[row][known], test.rows.features[row][held]
            vectors[row] = unit(ridge(x, targets, groups, new))
        ranks = {row: retrieval_ranks(x, texts_TE, of_pictures) for row, x in vectors.items()}
        scores = _titled({row: (rank < TOP).astype(np.float64) for row, rank in ranks.items()})
        scores["chance"] = np.full(len(held), min(1.0, TOP / len(texts)))
    note = f"own caption among the {TOP} nearest of {len(texts)}; baselines mapped to texts by ridge on the train split"
    clusters = [test.groups[i] for i in held]
    return Metric("retrieval_r10", "Caption R@10", "higher", True, note, scores, clusters)


def _teacher_cosine(train: Split, test: Split) -> Metric:
    known, truth = train.rows.in_space[TEACHER], test.rows.in_space[TEACHER]
    vectors = {row: x for row, x in test.rows.in_space.items() if row != TEACHER}
    for row in (HISTOGRAM, PIXELS):
        vectors[row] = ridge(train.rows.features[row], known, train.groups, test.rows.features[row])
    vectors["mean teacher vector"] = np.broadcast_to(known.mean(0), truth.shape)
    scores = _titled({row: cosines(x, truth) for row, x in vectors.items()})
    note = "mean cosine of the fused vector and the teacher's; baselines by ridge on the train split"
    return Metric("teacher_cosine", "Cosine to teacher", "higher", True, note, scores, test.groups)


def _linear_probe(train: Split, test: Split) -> Metric:
    """Runs the probe of `uniemox evaluate probe` on the labelled samples of both splits. A label that the training
    split lacks is never answered."""
    known = [i for i, label in enumerate(train.labels) if label is not None]
    held = [i for i, label in enumerate(test.labels) if label is not None]
    labels, groups = [str(train.labels[i]) for i in known], [train.groups[i] for i in known]
    names = sorted(set(labels))
    number = {name: i for i, name in enumerate(names)}
    scores: dict[str, np.ndarray] = {}
    facts: dict[str, dict[str, Any]] = {}
    if len(names) > 1 and held:
        target = np.array([number[label] for label in labels])
        truth = np.array([number.get(str(test.labels[i]), -1) for i in held])
        for row in (RELEASE, *BASELINES):
            x, new = train.rows.features[row][known], test.rows.features[row][held]
            accuracy = cross_validate(x, target, len(names), groups, logistic_regression, PENALTIES)
            penalty = max(accuracy, key=lambda p: accuracy[p])
            answers = logistic_regression(x, target, len(names), new, [penalty])[penalty]
            scores[_title(row)] = (answers == truth).astype(np.float64)
            facts[_title(row)] = {"penalty": penalty}
        scores[COMMON] = (truth == np.bincount(target).argmax()).astype(np.float64)
    note = f"accuracy over {len(names)} labels; encoder's class token, before fusion"
    clusters = [test.groups[i] for i in held]
    return Metric("linear_probe", "Linear probe", "higher", False, note, scores, clusters, facts=facts)


def _valence(train: Split, test: Split, attribute: str) -> Metric:
    there, held = (read_numbers(split, attribute) for split in (train, test))
    known, is_held = ~np.isnan(there), ~np.isnan(held)
    truth = held[is_held]
    scores: dict[str, np.ndarray] = {}
    if known.sum() >= MIN_VALENCE and is_held.sum() >= MIN_VALENCE:
        groups = [g for g, k in zip(train.groups, known) if k]
        for row in (RELEASE, *BASELINES):
            x, new = train.rows.features[row][known], test.rows.features[row][is_held]
            scores[_title(row)] = ridge(x, there[known][:, None], groups, new)[:, 0]
    note = f"an illustration only, n = {len(truth)}: Pearson correlation of a ridge from the features"
    clusters = [g for g, h in zip(test.groups, is_held) if h]
    return Metric(
        "valence",
        "Valence",
        "higher",
        False,
        note,
        scores,
        clusters,
        lambda s, drawn: pearson(s[drawn], truth[drawn]),
    )


def _table(metric: Metric) -> dict[str, Any]:
    bootstrap = Bootstrap(metric.clusters)
    rows = []
    for row, scores in metric.scores.items():
        low, high = metric.interval(bootstrap, scores)
        line = {
            "row": row,
            "value": round(metric.value(scores), 5),
            "low": round(low, 5),
            "high": round(high, 5),
        }
        rows.append({**line, **metric.facts.get(row, {})})
    facts = {"name": metric.name, "title": metric.title, "better": metric.better, "primary": metric.primary}
    return {**facts, "n": len(metric.clusters), "note": metric.note, "rows": rows}


def _verdict(metrics: list[Metric]) -> list[str]:
    """Returns one sentence per metric, by the 95 % intervals of the paired differences, and one that sums them up."""
    sentences, not_won = [], []
    for metric in metrics:
        if STUDENT not in metric.scores:
            continue
        bootstrap = Bootstrap(metric.clusters)
        groups: dict[str, list[str]] = {"better than": [], "statistically tied with": [], "worse than": []}
        for row, scores in metric.scores.items():
            if row != STUDENT:
                low, high = metric.gain(bootstrap, scores)
                word = "better than" if low > 0 else "worse than" if high < 0 else "statistically tied with"
                groups[word].append(row)
        title = metric.title if metric.primary else f"{metric.title} (secondary)"
        parts = [f"{word} {_list(rows)}" for word, rows in groups.items() if rows]
        sentences.append(f"{title}: the student is {'; '.join(parts)}.")
        if groups["statistically tied with"] or groups["worse than"]:
            not_won.append(title)
    sentences.append(
        f"The student does not beat every row in {_list(not_won)}."
        if not_won
        else "The student beats every row in every metric."
    )
    return sentences


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
