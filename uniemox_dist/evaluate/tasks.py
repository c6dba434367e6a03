"""The six tasks on embedded splits: k-NN, linear probe, distribution, regression, zero-shot, retrieval. Each has rows
with intervals.

k and the penalties are chosen by cross-validation on the training split, or on a validation split that the caller
names. The test split is only used for the measurement.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.format.sample import DIMENSIONS
from uniemox_dist.core.errors import UserError
from uniemox_dist.evaluate.embedding_pass import Split
from uniemox_dist.evaluate.intervals import Bootstrap
from uniemox_dist.evaluate.metrics import (
    classification,
    dimensions,
    distinct_captions,
    distribution_scores,
    label_distribution,
    retrieval_ranks,
    softmax,
    unit,
)
from uniemox_dist.evaluate.probes import (
    FOLDS,
    KS,
    PENALTIES,
    Classifier,
    cross_validate,
    cross_validate_distributions,
    fit_distributions,
    logistic_regression,
    ridge,
)
from uniemox_dist.evaluate.probes import (
    knn as nearest_neighbours,
)
from uniemox_dist.teacher.model import Teacher

TEMPLATES = (
    "a photo that evokes {}",
    "a picture of {}",
    "an image that makes people feel {}",
    "{}",
)
RETRIEVAL_KS = (1, 5, 10)
TEXT_BATCH = 256
MOST_NAMED = 8
MEAN = "training mean"
"""The row that answers with the mean of the training split."""
COMMON = "most common label"
"""The row that answers with the training split's most common label."""


def knn(train: Split, val: Split | None, test: Split) -> dict[str, Any]:
    """k nearest neighbours by cosine; the result also holds the test accuracy of every k."""
    return _classify(train, val, test, nearest_neighbours, "k", KS, sweep=True)


def probe(train: Split, val: Split | None, test: Split) -> dict[str, Any]:
    """A linear probe: multinomial logistic regression on standardised features."""
    return _classify(train, val, test, logistic_regression, "penalty", PENALTIES, sweep=False)


def distribution(train: Split, val: Split | None, test: Split) -> dict[str, Any]:
    """Predicts distributions over labels by multinomial logistic regression on standardised features. The penalty is
    the one with the lowest Kullback-Leibler divergence.

    Raises:
        UserError: for samples without a distribution, one label only, or labels that the training split lacks.
    """
    names = list_distribution_labels(train, [test] if val is None else [val, test])
    share_nC, true_mC = read_shares(train, names), read_shares(test, names)
    rows: dict[str, Any] = {}
    for row, x in train.rows.features.items():
        if val is None:
            scores = cross_validate_distributions(x, share_nC, train.groups, PENALTIES)
        else:
            tried = fit_distributions(x, share_nC, val.rows.features[row], PENALTIES)
            known = read_shares(val, names)
            divergences = {
                p: distribution_scores(softmax(z), known)["kl_divergence"] for p, z in tried.items()
            }
            scores = {penalty: float(divergence.mean()) for penalty, divergence in divergences.items()}
        best = min(scores, key=lambda value: scores[value])
        logits_mC = fit_distributions(x, share_nC, test.rows.features[row], [best])[best]
        rows[row] = {
            "penalty": best,
            "validation": [[value, round(scores[value], 5)] for value in sorted(scores)],
            **label_distribution(logits_mC, true_mC, names, test.groups),
        }
    mean_mC = np.tile(np.log(share_nC.mean(0)), (len(true_mC), 1))
    rows[MEAN] = label_distribution(mean_mC, true_mC, names, test.groups)
    return {"labels": names, "chosen_on": _chosen_on(val), "rows": rows}


def list_distribution_labels(train: Split, others: Sequence[Split]) -> list[str]:
    """The labels that have a share in some training sample, sorted.

    Raises:
        UserError: if there are fewer than two, samples without a distribution, or labels with a share that only other
            splits have.
    """
    found = []
    for split in (train, *others):
        missing = split.distributions.count(None)
        if missing:
            fix = "pack from a source with distributions, or classify labels with probe"
            if missing < len(split):
                fix = "`uniemox shards select --filter 'distribution is not None'` drops them"
            raise UserError(
                f"DATA={split.path}: {missing} of {len(split)} samples have no label distribution; {fix}"
            )
        found.append(
            {name for shares in split.distributions for name, share in (shares or {}).items() if share}
        )
    if len(found[0]) < 2:
        raise UserError(
            f"DATA={train.path}: all distributions have one label only ({', '.join(found[0])}); give a split with more"
        )
    for split, names in zip(others, found[1:]):
        _check_known(split, names - found[0], train)
    return sorted(found[0])


def read_shares(split: Split, names: Sequence[str]) -> np.ndarray:
    """The distributions of all samples over the labels, n×C; each divided by its sum."""
    shares_nC = np.array([[(own or {}).get(name, 0.0) for name in names] for own in split.distributions])
    found: np.ndarray = shares_nC / shares_nC.sum(1, keepdims=True)
    return found


def zeroshot(
    test: Split, teacher: Teacher, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> dict[str, Any]:
    """Classifies pictures by texts made of the labels; nothing is learned from the data.

    Raises:
        UserError: for samples without a label, labels that `names` lacks, or names and templates that do not fit.
    """
    _check_labelled(test)
    unknown = sorted({str(label) for label in test.labels} - set(names))
    vectors_CE = embed_label_texts(teacher, names, templates)
    if unknown:
        raise UserError(
            f"DATA={test.path}: has labels that --labels lacks: {_some(unknown)}; name all of them"
        )
    bootstrap, truth = Bootstrap(test.groups), _numbers(test.labels, names)
    rows = {
        row: classification(truth, find_nearest_texts(vectors, vectors_CE), names, bootstrap)
        for row, vectors in test.rows.in_space.items()
    }
    return {"templates": list(templates), "labels": list(names), "rows": rows}


def embed_label_texts(
    teacher: Teacher, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> np.ndarray:
    """Labels as unit rows C×E of the teacher's space: the mean over templates. `-` and `_` in labels become spaces.

    Raises:
        UserError: for fewer than two labels, a label given twice, or a template without {}.
    """
    if len(labels) < 2:
        raise UserError(
            f"--labels: names one class only ({', '.join(labels) or 'none'}); give at least two, separated by commas"
        )
    if len(set(labels)) < len(labels):
        twice = next(label for i, label in enumerate(labels) if label in labels[:i])
        raise UserError(f"--labels: names {twice} twice; give each once")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"--template={template!r}: has no {{}} where the label goes")
    words = [label.replace("-", " ").replace("_", " ") for label in labels]
    texts = [unit(embed_texts(teacher, [t.format(word) for word in words])) for t in templates]
    return unit(np.mean(texts, axis=0))


def find_nearest_texts(vectors_nE: np.ndarray, texts_CE: np.ndarray) -> np.ndarray:
    """The index of the text nearest to each vector by cosine, n."""
    found: np.ndarray = (unit(vectors_nE) @ unit(texts_CE).T).argmax(1)
    return found


def embed_texts(teacher: Teacher, texts: Sequence[str]) -> np.ndarray:
    """Texts as unit rows T×E of the teacher's space."""
    starts = range(0, len(texts), TEXT_BATCH)
    return np.concatenate(
        [teacher.embed_texts(list(texts[i : i + TEXT_BATCH])).cpu().numpy() for i in starts]
    )


def retrieval(test: Split, teacher: Teacher) -> dict[str, Any]:
    """R@1, R@5 and R@10 from pictures to captions and back. Equal captions are one text; any caption of a picture, and
    any picture of a caption, is right.

    Raises:
        UserError: if a sample has no caption, or all captions are equal.
    """
    without = sum(not own for own in test.captions)
    if without:
        raise UserError(
            f"DATA={test.path}: {without} of {len(test)} samples have no caption; retrieval needs one for each"
        )
    texts, of_pictures, of_texts = distinct_captions(test.captions)
    if len(texts) < 2:
        raise UserError(f"DATA={test.path}: all captions are the same text; there is nothing to retrieve")
    texts_TE = embed_texts(teacher, texts)
    bootstrap = Bootstrap(test.groups)
    # A text is resampled together with the look-alikes of its first picture.
    text_bootstrap = Bootstrap([test.groups[pictures[0]] for pictures in of_texts])
    rows = {
        row: {
            "image_to_text": _recalls(retrieval_ranks(vectors, texts_TE, of_pictures), bootstrap),
            "text_to_image": _recalls(retrieval_ranks(texts_TE, vectors, of_texts), text_bootstrap),
        }
        for row, vectors in test.rows.in_space.items()
    }
    return {"pictures": len(test), "texts": len(texts), "rows": rows}


def regress(train: Split, test: Split, names: Sequence[str] = ()) -> dict[str, Any]:
    """Predicts numbers that samples have as attributes by ridge regression on the features, each by itself, over the
    samples where it is known.

    Args:
        names: attributes; by default those of valence, arousal and dominance that samples or their persons have.

    Raises:
        UserError: for an attribute that fewer than two training samples, or no test sample, have as a number.
    """
    values = {
        name: tuple(read_numbers(split, name) for split in (train, test)) for name in names or DIMENSIONS
    }
    known = {name: (int(np.isfinite(a).sum()), int(np.isfinite(b).sum())) for name, (a, b) in values.items()}
    lacking = [name for name, (of_train, of_test) in known.items() if of_train < 2 or not of_test]
    if names and lacking:
        of_train, of_test = known[lacking[0]]
        raise UserError(
            f"--attribute={lacking[0]}: is a number in {of_train} training and {of_test} test samples; two and one are "
            "needed"
        )
    chosen = [name for name in values if name not in lacking]
    if not chosen:
        raise UserError(
            f"DATA={train.path}: too few samples have a number as their valence, arousal or dominance; name other "
            "attributes with --attribute"
        )
    true_nV = np.stack([values[name][1] for name in chosen], axis=1)
    found = {row: np.full(true_nV.shape, np.nan) for row in (*train.rows.features, MEAN)}
    for number, name in enumerate(chosen):
        there_n = values[name][0]
        is_known_n = np.isfinite(there_n)
        groups = [group for group, is_known in zip(train.groups, is_known_n) if is_known]
        for row, x in train.rows.features.items():
            target_nE = there_n[is_known_n][:, None]
            answers_mE = ridge(x[is_known_n], target_nE, groups, test.rows.features[row])
            found[row][:, number] = answers_mE[:, 0]
        found[MEAN][:, number] = there_n[is_known_n].mean()
    rows = {row: dimensions(found_nV, true_nV, chosen, test.groups) for row, found_nV in found.items()}
    return {"attributes": chosen, "rows": rows}


def read_numbers(split: Split, attribute: str) -> np.ndarray:
    """An attribute of all samples; NaN for one that lacks it, or has something else than a number."""
    values = [attributes.get(attribute) for attributes in split.attributes]
    return np.array(
        [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else np.nan for v in values]
    )


def _recalls(ranks: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    found: dict[str, Any] = {"median_place": float(np.median(ranks)) + 1}
    for k in RETRIEVAL_KS:
        hits = (ranks < k).astype(np.float64)
        low, high = bootstrap.mean(hits)
        found[f"R@{k}"] = {"value": float(hits.mean()), "low": low, "high": high}
    return found


def _classify(
    train: Split,
    val: Split | None,
    test: Split,
    classify: Classifier,
    parameter: str,
    values: Sequence[float],
    *,
    sweep: bool,
) -> dict[str, Any]:
    names = list_label_names(train, [test] if val is None else [val, test])
    target, truth = _numbers(train.labels, names), _numbers(test.labels, names)
    bootstrap = Bootstrap(test.groups)
    rows: dict[str, Any] = {}
    for row, x in train.rows.features.items():
        if val is None:
            scores = cross_validate(x, target, len(names), train.groups, classify, values)
        else:
            right = _numbers(val.labels, names)
            tried = classify(x, target, len(names), val.rows.features[row], values)
            scores = {value: float((answers == right).mean()) for value, answers in tried.items()}
        best = max(scores, key=lambda value: scores[value])
        measured = list(scores) if sweep else [best]
        answers = classify(x, target, len(names), test.rows.features[row], measured)
        rows[row] = {
            parameter: best,
            "validation": [[value, round(scores[value], 5)] for value in sorted(scores)],
            **classification(truth, answers[best], names, bootstrap),
        }
        if sweep:
            by_value = [[v, round(float((a == truth).mean()), 5)] for v, a in answers.items()]
            rows[row][f"test_by_{parameter}"] = by_value
    common = int(np.bincount(target, minlength=len(names)).argmax())
    rows[COMMON] = classification(truth, np.full(len(truth), common), names, bootstrap)
    return {"labels": names, "chosen_on": _chosen_on(val), "rows": rows}


def _chosen_on(val: Split | None) -> str:
    return f"{FOLDS}-fold cross-validation on the training split" if val is None else val.path


def list_label_names(train: Split, others: Sequence[Split]) -> list[str]:
    """The classes: the labels of the training split, sorted.

    Raises:
        UserError: if there are fewer than two, samples without a label, or labels that only other splits have.
    """
    for split in (train, *others):
        _check_labelled(split)
    names = sorted({str(label) for label in train.labels})
    if len(names) < 2:
        raise UserError(f"DATA={train.path}: has one class only ({names[0]}); give a split with two or more")
    for split in others:
        _check_known(split, {str(label) for label in split.labels} - set(names), train)
    return names


def _check_known(split: Split, unknown: set[str], train: Split) -> None:
    if unknown:
        raise UserError(
            f"DATA={split.path}: has labels that are not in {train.path}: {_some(sorted(unknown))}; give splits of one "
            "set"
        )


def _check_labelled(split: Split) -> None:
    missing = split.labels.count(None)
    if missing == len(split):
        raise UserError(
            f"DATA={split.path}: none of {missing} samples has a label; give a labelled data set (labels of persons, "
            "as of EMOTIC, are for `uniemox finetune`)"
        )
    if missing:
        raise UserError(
            f"DATA={split.path}: {missing} of {len(split)} samples have no label; classify labelled samples "
            "(`uniemox shards select --filter 'label is not None'` drops others)"
        )


def _numbers(labels: Sequence[str | None], names: Sequence[str]) -> np.ndarray:
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[str(label)] for label in labels])


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
