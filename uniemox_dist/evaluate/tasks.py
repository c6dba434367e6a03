"""The four tasks on a data set's splits: k-NN, linear probe, zero-shot, retrieval, each with its rows and intervals.

What is chosen (k, the penalty) is chosen on a validation split, or on a fifth of the training split that keeps groups
of look-alikes together; the test split is looked at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uniemox_dist.core.errors import UserError
from uniemox_dist.evaluate.baselines import folds
from uniemox_dist.evaluate.classification import summary
from uniemox_dist.evaluate.classifiers import KS, PENALTIES, by_texts, linear, neighbours
from uniemox_dist.evaluate.features import unit
from uniemox_dist.evaluate.metrics import bootstrap
from uniemox_dist.evaluate.retrieval import KS as RETRIEVAL_KS
from uniemox_dist.evaluate.retrieval import distinct, places
from uniemox_dist.evaluate.vectors import Vectors
from uniemox_dist.teacher.model import Teacher

TEMPLATES = (
    "a photo that evokes {}",
    "a picture of {}",
    "an image that makes people feel {}",
    "{}",
)
VALIDATION_FOLDS = 5
MOST_NAMED = 8


@dataclass(frozen=True)
class Fit:
    """What a classifier learns from, and the rows that it is to answer."""

    x: np.ndarray
    target: np.ndarray
    classes: int
    new: np.ndarray


def label_names(train: Vectors, others: Sequence[Vectors]) -> list[str]:
    """The classes: the labels of the training split, sorted.

    Raises:
        UserError: if there are fewer than two, samples without a label, or labels that only other splits have.
    """
    for split in (train, *others):
        missing = split.labels.count(None)
        if missing:
            raise UserError(
                f"DATA={split.path}: {missing} of {len(split)} samples have no label; classify labelled samples "
                "(`uniemox shards select` drops others)"
            )
    names = sorted({str(label) for label in train.labels})
    if len(names) < 2:
        raise UserError(f"DATA={train.path}: has one class only ({names[0]}); nothing can be told apart")
    for split in others:
        unknown = sorted({str(label) for label in split.labels} - set(names))
        if unknown:
            raise UserError(
                f"DATA={split.path}: has labels that are not in {train.path}: {_some(unknown)}; give splits of one set"
            )
    return names


def missing_classes(names: Sequence[str], test: Vectors) -> list[str]:
    """Classes of which the test split has no sample: they do not count in averages over classes."""
    return sorted(set(names) - set(map(str, test.labels)))


def knn(train: Vectors, val: Vectors | None, test: Vectors) -> dict[str, Any]:
    """k nearest neighbours by cosine; k by validation, and the accuracy of every k beside it."""

    def answer(data: Fit, ks: Sequence[float]) -> dict[float, np.ndarray]:
        known = [int(k) for k in ks if k <= len(data.x)]
        return {
            float(k): a for k, a in neighbours(data.x, data.target, data.classes, data.new, known).items()
        }

    return _classify(train, val, test, answer, "k", KS, sweep=True)


def probe(train: Vectors, val: Vectors | None, test: Vectors) -> dict[str, Any]:
    """A linear probe; its penalty by validation."""

    def answer(data: Fit, penalties: Sequence[float]) -> dict[float, np.ndarray]:
        return {p: linear(data.x, data.target, data.classes, p)(data.new) for p in penalties}

    return _classify(train, val, test, answer, "penalty", PENALTIES, sweep=False)


def each_once(labels: Sequence[str]) -> None:
    """Raises UserError for a label that is named twice: its texts would share what belongs to one."""
    if len(set(labels)) < len(labels):
        twice = next(label for i, label in enumerate(labels) if label in labels[:i])
        raise UserError(f"--labels: names {twice} twice; give each once")


def zeroshot(
    test: Vectors, teacher: Teacher, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> dict[str, Any]:
    """Pictures against texts made of the labels, the mean over templates; nothing is learned from the data."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"--template={template!r}: has no {{}} where the label goes")
    each_once(names)
    unknown = sorted({str(label) for label in test.labels} - set(names))
    if unknown:
        raise UserError(
            f"DATA={test.path}: has labels that --labels has not: {_some(unknown)}; name all of them"
        )
    if len(names) < 2:
        raise UserError(f"--labels: names one class only ({names[0]}); nothing can be told apart")
    words = [name.replace("-", " ").replace("_", " ") for name in names]
    texts = [unit(teacher.embed_texts([t.format(w) for w in words]).cpu().numpy()) for t in templates]
    mean_CE = np.mean(texts, axis=0)
    interval, truth = bootstrap(test.groups), _numbers(test, names)
    rows = {
        row: summary(truth, by_texts(vectors, mean_CE), names, interval) for row, vectors in test.rows.items()
    }
    return {"templates": list(templates), "labels": list(names), "rows": rows}


def retrieval(test: Vectors, teacher: Teacher, batch: int = 256) -> dict[str, Any]:
    """R@1, 5 and 10 from pictures to captions and back."""
    captions = test.captions
    without = sum(not own for own in captions)
    if without:
        raise UserError(
            f"DATA={test.path}: {without} of {len(test)} samples have no caption; retrieval needs one for each"
        )
    texts, of_pictures, of_texts = distinct(captions)
    if len(texts) < 2:
        raise UserError(f"DATA={test.path}: all captions are the same text; there is nothing to retrieve")
    parts = [teacher.embed_texts(texts[i : i + batch]).cpu().numpy() for i in range(0, len(texts), batch)]
    texts_TE = np.concatenate(parts)
    interval = bootstrap(test.groups)
    # A text goes with the look-alikes of its first picture.
    text_interval = bootstrap([test.groups[pictures[0]] for pictures in of_texts])
    rows: dict[str, Any] = {}
    for row, vectors in test.rows.items():
        rows[row] = {
            "image_to_text": _recalls(places(vectors, texts_TE, of_pictures), interval),
            "text_to_image": _recalls(places(texts_TE, vectors, of_texts), text_interval),
        }
    return {"pictures": len(test), "texts": len(texts), "rows": rows}


def _recalls(
    place: np.ndarray, interval: Callable[[Callable[[np.ndarray], float]], tuple[float, float]]
) -> dict[str, Any]:
    found: dict[str, Any] = {"median_place": float(np.median(place)) + 1}
    for k in RETRIEVAL_KS:
        hits = (place < k).astype(np.float64)
        low, high = interval(lambda draw, hits=hits: float(hits[draw].mean()))  # type: ignore[misc]
        found[f"R@{k}"] = {"value": float(hits.mean()), "low": low, "high": high}
    return found


def _classify(
    train: Vectors,
    val: Vectors | None,
    test: Vectors,
    answer: Callable[[Fit, Sequence[float]], dict[float, np.ndarray]],
    what: str,
    values: Sequence[float],
    *,
    sweep: bool,
) -> dict[str, Any]:
    names = label_names(train, [test] if val is None else [val, test])
    target, truth = _numbers(train, names), _numbers(test, names)
    held = folds(train.groups, VALIDATION_FOLDS) == 0 if val is None else None
    if held is not None and (held.all() or not held.any()):
        raise UserError(f"DATA={train.path}: is too small to hold out a validation part; give a val split")
    interval = bootstrap(test.groups)
    rows: dict[str, Any] = {}
    for row, x in train.rows.items():
        if val is None or held is not None:
            assert held is not None
            tried = answer(Fit(x[~held], target[~held], len(names), x[held]), values)
            right = target[held]
        else:
            tried = answer(Fit(x, target, len(names), val.rows[row]), values)
            right = _numbers(val, names)
        scores = {value: float((answers == right).mean()) for value, answers in tried.items()}
        best = max(scores, key=lambda value: scores[value])
        on_test = answer(Fit(x, target, len(names), test.rows[row]), list(tried) if sweep else [best])
        by_value = [[v, round(float((a == truth).mean()), 5)] for v, a in on_test.items()]
        rows[row] = {
            what: best,
            "validation": [[value, round(score, 5)] for value, score in scores.items()],
            **({f"test_by_{what}": by_value} if sweep else {}),
            **summary(truth, on_test[best], names, interval),
        }
    common = int(np.bincount(target, minlength=len(names)).argmax())
    constant = np.full(len(truth), common)
    rows["most common label"] = summary(truth, constant, names, interval)
    chosen_on = val.path if val is not None else "a fifth of the training split"
    return {"labels": names, "chosen_on": chosen_on, "rows": rows}


def _numbers(split: Vectors, names: Sequence[str]) -> np.ndarray:
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[str(label)] for label in split.labels])


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
