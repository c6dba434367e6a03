"""The single tasks: figures equal scikit-learn's, and what does not fit is one line."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_sets import distribution_set, emotic_set, packed
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import UserError
from uniemox_dist.evaluate import tasks
from uniemox_dist.evaluate.embedding_pass import Split
from uniemox_dist.evaluate.intervals import Bootstrap
from uniemox_dist.evaluate.measure import draw_confusion
from uniemox_dist.evaluate.metrics import classification, distinct_captions, retrieval_ranks, softmax, unit
from uniemox_dist.evaluate.probes import fit_distributions, knn, logistic_regression
from uniemox_dist.evaluate.subject import RELEASE, Rows

NAMES = ["anger", "awe", "fear", "joy"]
RANDOM = np.random.RandomState(0)
CENTRES = RANDOM.randn(4, 12)


def split_of(count: int, seed: int, names: list[str] = NAMES, noise: float = 1.0) -> Split:
    """Vectors around a centre for each label."""
    random = np.random.RandomState(seed)
    which = random.randint(0, len(names), count)
    x = CENTRES[[NAMES.index(names[i]) if names[i] in NAMES else 0 for i in which]] + noise * random.randn(
        count, 12
    )
    keys = [f"{seed}-{i}" for i in range(count)]
    labels: list[str | None] = [names[i] for i in which]
    return Split(
        f"split{seed}",
        "0" * 64,
        keys,
        labels,
        [[f"text {k}"] for k in keys],
        keys,
        [{} for _ in keys],
        [None for _ in keys],
        Rows({RELEASE: x}, {RELEASE: x}),
    )


def test_figures_are_scikit_learns() -> None:
    truth, answers = RANDOM.randint(0, 4, 300), RANDOM.randint(0, 4, 300)
    found = classification(truth, answers, NAMES, Bootstrap([str(i) for i in range(300)]))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, answers))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, answers, average="macro"))
    assert found["mean_recall"] == pytest.approx(sk.balanced_accuracy_score(truth, answers))
    assert found["confusion"] == sk.confusion_matrix(truth, answers).tolist()
    precision, recall, f1, support = sk.precision_recall_fscore_support(truth, answers)
    for i, row in enumerate(found["classes"]):
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(
            (precision[i], recall[i], f1[i], support[i])
        )
    assert found["low"] < found["accuracy"] < found["high"]


def test_neighbours_and_probe_answer_as_scikit_learn_does() -> None:
    train, test = split_of(200, 1), split_of(80, 2)
    target = np.array([NAMES.index(str(label)) for label in train.labels])
    x, new = train.rows.features[RELEASE], test.rows.features[RELEASE]
    model = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.07)
    )
    assert np.array_equal(knn(x, target, 4, new, [1, 7])[7], model.fit(x, target).predict(new))
    scale = StandardScaler().fit(x)
    for penalty in (1.0, 0.01, 1e-4):
        # theirs: sum of losses + |w|² / (2 C); ours: mean of losses + penalty · |w|²
        theirs = LogisticRegression(C=1 / (2 * len(x) * penalty), tol=1e-8, max_iter=10_000)
        expected = theirs.fit(scale.transform(x), target).predict(scale.transform(new))
        ours = logistic_regression(x, target, 4, new, [10.0, penalty])
        assert np.array_equal(ours[penalty], expected)
    # More features than samples, of which some repeat others.
    wide, wide_new = np.hstack([x, x[:, :3], RANDOM.randn(200, 300)]), RANDOM.randn(80, 315)
    scale = StandardScaler().fit(wide)
    theirs = LogisticRegression(C=1 / (2 * 200 * 0.1), tol=1e-8, max_iter=10_000)
    expected = theirs.fit(scale.transform(wide), target).predict(scale.transform(wide_new))
    assert np.array_equal(logistic_regression(wide, target, 4, wide_new, [0.1])[0.1], expected)


def test_hyperparameters_are_chosen_on_validation() -> None:
    train, val, test = split_of(150, 3), split_of(60, 4), split_of(60, 5)
    for task, what in ((tasks.knn, "k"), (tasks.probe, "penalty")):
        row = task(train, val, test)["rows"][RELEASE]
        scores = dict(row["validation"])
        assert scores[row[what]] == max(scores.values())
        assert row["accuracy"] > 0.6
    found = tasks.knn(train, None, test)
    assert found["chosen_on"] == "5-fold cross-validation on the training split"
    assert dict(found["rows"][RELEASE]["test_by_k"])[found["rows"][RELEASE]["k"]] == pytest.approx(
        found["rows"][RELEASE]["accuracy"], abs=1e-5
    )
    common = max(set(train.labels), key=train.labels.count)
    share = sum(label == common for label in test.labels) / len(test)
    assert found["rows"]["most common label"]["accuracy"] == pytest.approx(share)


def test_a_class_that_the_test_split_lacks_does_not_count_in_averages() -> None:
    found = tasks.knn(split_of(150, 6), None, split_of(60, 7, NAMES[:3]))["rows"][RELEASE]
    last = found["classes"][-1]
    assert (last["label"], last["support"], last["recall"], last["f1"]) == ("joy", 0, None, None)
    assert found["mean_recall"] == pytest.approx(np.mean([c["recall"] for c in found["classes"][:3]]))


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        (NAMES[:1], NAMES[:1], "has one class only (anger)"),
        (NAMES, [*NAMES, "sadness"], "has labels that are not in split8: sadness"),
    ],
)
def test_label_sets_that_do_not_match_are_one_line_errors(
    train: list[str], test: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=r"^DATA=") as caught:
        tasks.probe(split_of(40, 8, train), None, split_of(40, 9, test))
    assert says in str(caught.value)
    unlabelled = split_of(10, 10)
    unlabelled.labels[3] = None
    with pytest.raises(UserError, match="1 of 10 samples have no label"):
        tasks.knn(split_of(40, 8), None, unlabelled)
    unlabelled.labels[:] = [None] * 10
    with pytest.raises(UserError, match="none of 10 samples has a label; give a labelled data set"):
        tasks.knn(split_of(40, 8), None, unlabelled)


class Texts:
    """Stands for a teacher's text tower: a vector for each known word."""

    def embed_texts(self, texts: list[str]) -> Any:
        import torch

        where = [next((i for i, name in enumerate(NAMES) if name in text), 0) for text in texts]
        return torch.from_numpy(unit(CENTRES[where])).float()


def test_zero_shot_answers_the_nearest_text_and_records_the_templates() -> None:
    test = split_of(60, 11, noise=0.3)
    found = tasks.zeroshot(test, Texts(), NAMES, ["feel {}", "{}"])  # type: ignore[arg-type]
    assert found["templates"] == ["feel {}", "{}"]
    expected = tasks.find_nearest_texts(test.rows.features[RELEASE], CENTRES)
    truth = np.array([NAMES.index(str(label)) for label in test.labels])
    assert found["rows"][RELEASE]["accuracy"] == pytest.approx((expected == truth).mean())
    assert found["rows"][RELEASE]["accuracy"] > 0.95
    for names, templates, says in (
        (NAMES, ["feel"], "has no {} where"),
        (NAMES[:2], ["{}"], "labels that --labels lacks: fear, joy"),
    ):
        with pytest.raises(UserError, match=r"--template|DATA=") as caught:
            tasks.zeroshot(test, Texts(), names, templates)  # type: ignore[arg-type]
        assert says in str(caught.value)


def test_ranks_count_any_own_answer_and_half_of_the_ties() -> None:
    texts, of_pictures, of_texts = distinct_captions([["b", "a"], ["a"], ["c"]])
    assert texts == ["a", "b", "c"]
    assert of_pictures == [[1, 0], [0], [2]]
    assert of_texts == [[0, 1], [0], [2]]
    answers = np.eye(3)
    queries = np.array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.4, 0.4, 0.4]])
    # b is own and first; a is own and last of three; all three tie, so that half of the two others come before
    assert retrieval_ranks(queries, answers, of_pictures).tolist() == [0.0, 2.0, 1.0]


def test_retrieval_both_ways() -> None:
    test = split_of(20, 12, noise=0.01)

    class Own:
        def embed_texts(self, texts: list[str]) -> Any:
            import torch

            place = {f"text {key}": i for i, key in enumerate(test.keys)}
            return torch.from_numpy(unit(test.rows.features[RELEASE][[place[text] for text in texts]]))

    vectors = {RELEASE: unit(test.rows.features[RELEASE]), "constant": np.ones((20, 12))}
    given = replace(test, rows=Rows({}, vectors))
    rows = tasks.retrieval(given, Own())["rows"]  # type: ignore[arg-type]
    for way in ("image_to_text", "text_to_image"):
        assert rows[RELEASE][way]["R@1"]["value"] == 1.0
        assert rows[RELEASE][way]["median_place"] == 1.0
    assert (
        rows["constant"]["text_to_image"]["R@5"]["value"] == 0.0
    )  # everything ties: the middle place is 9.5
    test.captions[0] = []
    with pytest.raises(UserError, match="1 of 20 samples have no caption"):
        tasks.retrieval(test, Own())  # type: ignore[arg-type]


def test_a_confusion_matrix_is_drawn(tmp_path: Path) -> None:
    draw_confusion(np.array([[5, 1], [0, 7]]), ["a", "b"], "knn", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", [("evaluate", "protocol"), ("evaluate", "knn")])
def test_a_negative_number_of_processes_is_refused(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    from uniemox_dist.cli.main import run

    assert run([*command, "release", "data", "--workers", "-1"]) == 2
    assert "'--workers'" in capsys.readouterr().err


def test_numbers_are_predicted_by_ridge_where_they_are_known() -> None:
    def with_values(split: Split) -> Split:
        x = split.rows.features[RELEASE]
        numbers = 3 * x[:, 0] - x[:, 1] + 5
        attributes: list[dict[str, Any]] = [
            {"valence": float(v), "arousal": 4, "dominance": "high"} for v in numbers
        ]
        for i in range(0, len(attributes), 5):
            del attributes[i]["valence"]
        return replace(split, attributes=attributes)

    train, test = with_values(split_of(200, 1)), with_values(split_of(80, 2))
    found = tasks.regress(train, test)
    assert found["attributes"] == ["valence", "arousal"]  # no sample has a number as its dominance
    valence, arousal = found["rows"][RELEASE]["dimensions"]
    assert (valence["samples"], arousal["samples"]) == (64, 80)
    assert valence["correlation"] > 0.999
    assert valence["ccc"] > 0.999
    assert valence["correlation_interval"][0] <= valence["correlation"] <= valence["correlation_interval"][1]
    assert (arousal["mean_absolute_error"], arousal["correlation"]) == (pytest.approx(0, abs=1e-9), None)
    flat = found["rows"][tasks.MEAN]["dimensions"][0]
    known = tasks.read_numbers(train, "valence")
    truth = tasks.read_numbers(test, "valence")
    assert flat["mean_absolute_error"] == pytest.approx(np.nanmean(np.abs(np.nanmean(known) - truth)))
    assert (flat["correlation"], flat["ccc"]) == (None, pytest.approx(0))
    only = tasks.regress(train, test, ["arousal"])
    assert only["attributes"] == ["arousal"]
    with pytest.raises(
        UserError, match=r"^--attribute=dominance: is a number in 0 training and 0 test samples"
    ):
        tasks.regress(train, test, ["valence", "dominance"])
    with pytest.raises(
        UserError, match="too few samples have a number as their valence, arousal or dominance"
    ):
        tasks.regress(split_of(5, 1), split_of(5, 2))


def with_shares(x: np.ndarray, shares: list[dict[str, float]], seed: int) -> Split:
    """A split of these features and distributions."""
    blank = split_of(len(x), seed)
    return replace(blank, distributions=list(shares), rows=Rows({RELEASE: x}))


def test_distributions_are_predicted_as_the_means_of_equal_features() -> None:
    # One feature of two values, and almost no penalty: the estimate is the mean distribution of the samples with the
    # same feature, (0.4, 0.6, 0) for 0 and (0.75, 0, 0.25) for 1.
    shares: list[dict[str, float]] = [
        {"awe": 0.6, "joy": 0.4},
        {"awe": 0.2, "joy": 0.8},
        {"awe": 1.0},
        {"awe": 0.5, "sad": 0.5},
    ]
    x = np.array([[0.0], [0.0], [1.0], [1.0]])
    train = with_shares(np.tile(x, (10, 1)), shares * 10, 1)
    test = with_shares(np.array([[0.0], [1.0]]), [{"awe": 0.5, "joy": 0.5}, {"sad": 1.0, "joy": 0.0}], 2)
    found = tasks.distribution(train, with_shares(x, shares, 3), test)
    assert found["labels"] == ["awe", "joy", "sad"]
    assert found["chosen_on"] == "split3"
    row = found["rows"][RELEASE]
    assert row["penalty"] == 1e-6
    # By hand, from (0.4, 0.6, 0) for (0.5, 0.5, 0) and (0.75, 0, 0.25) for (0, 0, 1).
    hand = {
        "kl_divergence": (0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6) + math.log(4)) / 2,
        "chebyshev": (0.1 + 0.75) / 2,
        "cosine": (0.5 / math.sqrt(0.5 * 0.52) + 0.25 / math.sqrt(0.625)) / 2,
        "intersection": (0.9 + 0.25) / 2,
        "accuracy": 0.5,  # either label of the first is right; of the second, awe is wrong
    }
    assert {name: row[name] for name in hand} == pytest.approx(hand, abs=2e-3)
    # An estimate is never 0, so Clark and Canberra count 1 for each label that has no share.
    canberra = (0.1 / 0.9 + 0.1 / 1.1 + 1 + 1 + 1 + 0.75 / 1.25) / 2
    assert row["canberra"] == pytest.approx(canberra, abs=2e-3)
    clark = (math.sqrt((1 / 9) ** 2 + (1 / 11) ** 2 + 1) + math.sqrt(1 + 1 + 0.6**2)) / 2
    assert row["clark"] == pytest.approx(clark, abs=2e-3)
    # The other row answers with the mean of the training split, (0.575, 0.3, 0.125).
    mean = found["rows"][tasks.MEAN]
    assert mean["chebyshev"] == pytest.approx((0.2 + 0.875) / 2)
    assert mean["kl_divergence"] == pytest.approx(
        (0.5 * math.log(0.5 / 0.575) + 0.5 * math.log(0.5 / 0.3) + math.log(8)) / 2
    )
    for measured in (row, mean):
        for name in (*hand, "clark", "canberra"):
            low, high = measured[f"{name}_interval"]
            assert low <= measured[name] <= high, name


def test_soft_labels_weigh_as_in_scikit_learn_and_the_penalty_has_the_lowest_divergence() -> None:
    random = np.random.RandomState(5)
    x, new = random.randn(60, 6), random.randn(30, 6)
    weights = random.randn(6, 3)

    def shares_of(features: np.ndarray) -> np.ndarray:
        return softmax(features @ weights + 0.5 * random.randn(len(features), 3))

    share_nC, true_mC = shares_of(x), shares_of(new)
    scale = StandardScaler().fit(x)
    for penalty in (1.0, 0.01):
        # A distribution is as much as a sample of each class, weighed with its share.
        theirs = LogisticRegression(C=1 / (2 * len(x) * penalty), tol=1e-8, max_iter=10_000)
        theirs.fit(
            np.repeat(scale.transform(x), 3, axis=0),
            np.tile(np.arange(3), 60),
            sample_weight=share_nC.ravel(),
        )
        ours = softmax(fit_distributions(x, share_nC, new, [10.0, penalty])[penalty])
        assert ours == pytest.approx(theirs.predict_proba(scale.transform(new)), abs=1e-4)
    names = ("a", "b", "c")
    train = with_shares(x, [dict(zip(names, row)) for row in share_nC], 1)
    test = with_shares(new, [dict(zip(names, row)) for row in true_mC], 2)
    found = tasks.distribution(train, None, test)
    row = found["rows"][RELEASE]
    scores = dict(row["validation"])
    assert scores[row["penalty"]] == min(scores.values())
    assert row["penalty"] not in (10.0, 1e-6)
    assert row["kl_divergence"] < 0.5 * found["rows"][tasks.MEAN]["kl_divergence"]
    assert found["chosen_on"] == "5-fold cross-validation on the training split"


def test_distributions_that_do_not_fit_are_one_line_errors() -> None:
    x = np.zeros((2, 1))
    both = with_shares(x, [{"awe": 0.5, "joy": 0.5}, {"joy": 1.0}], 1)
    for train, test, says in (
        (with_shares(x, [{"awe": 1.0}, {"awe": 1.0, "joy": 0.0}], 2), both, "have one label only (awe)"),
        (both, with_shares(x, [{"awe": 1.0}, {"fear": 1.0}], 2), "has labels that are not in split1: fear"),
        (split_of(3, 4), both, "split4: 3 of 3 samples have no label distribution; pack from"),
        (
            both,
            replace(both, distributions=[None, {"joy": 1.0}]),
            "1 of 2 samples have no label distribution; `uniemox shards select --filter 'distribution is not None'`",
        ),
    ):
        with pytest.raises(UserError, match=r"^DATA=") as caught:
            tasks.distribution(train, None, test)
        assert says in str(caught.value)


def test_a_set_of_distributions_is_measured_by_its_labels_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = distribution_set(tmp_path / "source", {"train": 24, "test": 12})
    data = packed(source, tmp_path / "data", layout="table")
    release = str(Path(__file__).parents[2] / "golden/release")
    assert run(["evaluate", "regress", release, str(data), "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:3] for line in out.splitlines()[1:5]] == [
        ["release", "valence", "9"],
        ["release", "arousal", "12"],
        ["training", "mean", "valence"],
        ["training", "mean", "arousal"],
    ]
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["format"], result["attributes"]) == ("uniemox-regress", ["valence", "arousal"])
    assert result["rows"]["release"]["dimensions"][1]["ccc"] is None  # of a constant
    assert run(["evaluate", "distribution", release, str(data), "--json", str(tmp_path / "d.json")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "KL divergence (lower is better)\n  release" in printed.out
    result = json.loads((tmp_path / "d.json").read_text())
    assert (result["format"], result["labels"]) == ("uniemox-distribution", ["awe", "fear", "joy"])
    assert list(result["rows"]) == ["release", "training mean"]
    truth = [json.loads(line)["distribution"] for line in (source / "test.jsonl").read_text().splitlines()]
    for found in result["rows"]["release"]["per_class"]:
        share = np.mean([own.get(found["label"], 0) for own in truth])
        assert found["mean_share"] == pytest.approx(share, abs=1e-6)
    assert run(["evaluate", "probe", release, str(data)]) == 0
    assert "joy" in capsys.readouterr().out
    assert run(["evaluate", "regress", release, str(data), "--attribute", "size"]) == 2
    assert "--attribute=size: is a number in 0 training and 0 test samples" in capsys.readouterr().err
    # A tie leaves a sample without a label, which tasks on labels refuse in one line.
    rows = (source / "train.jsonl").read_text().splitlines()
    tied = json.dumps({**json.loads(rows[0]), "distribution": {"joy": 0.5, "awe": 0.5}})
    (source / "train.jsonl").write_text("\n".join([tied, *rows[1:]]))
    tie = packed(source, tmp_path / "tie", layout="table")
    assert run(["evaluate", "knn", release, str(tie)]) == 2
    assert (
        "1 of 24 samples have no label; classify labelled samples (`uniemox shards select --filter 'label is"
        in (capsys.readouterr().err)
    )


def test_values_that_pictures_lack_are_the_means_of_their_persons(tmp_path: Path) -> None:
    data = packed(emotic_set(tmp_path / "source"), tmp_path / "data", layout="emotic")
    release = str(Path(__file__).parents[2] / "golden/release")
    assert run(["evaluate", "regress", release, str(data), "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["attributes"] == ["valence", "arousal", "dominance"]

    def means(count: int, dimension: int) -> list[float]:
        """Of the persons of each picture, as `emotic_set` writes them."""
        found = []
        for i in range(count):
            both = [
                [2.0 + i % 4, 5, 4] if (i + person) % 5 else [None, 6, None] for person in range(1 + i % 2)
            ]
            known = [values[dimension] for values in both if values[dimension] is not None]
            found += [sum(known) / len(known)] if known else []
        return found

    for number, measured in enumerate(result["rows"]["training mean"]["dimensions"]):
        train, test = means(16, number), means(6, number)
        assert measured["samples"] == len(test)
        error = np.abs(np.array(test) - np.mean(train)).mean()
        assert measured["mean_absolute_error"] == pytest.approx(error)
