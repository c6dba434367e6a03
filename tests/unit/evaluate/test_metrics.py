"""Scores and baselines against hand-made cases."""

import numpy as np
import pytest
import torch

from uniemox_dist.core.errors import UserError
from uniemox_dist.evaluate.baselines import colour_histogram, small_pixels
from uniemox_dist.evaluate.intervals import Bootstrap
from uniemox_dist.evaluate.metrics import cosines, distinct_captions, retrieval_ranks
from uniemox_dist.evaluate.probes import PENALTIES, cross_validate, folds, knn, logistic_regression, ridge
from uniemox_dist.evaluate.reconstruction import interpolate
from uniemox_dist.models.patches import patchify


def in_top(pictures: np.ndarray, texts: np.ndarray, captions: list[str], k: int) -> list[int]:
    """1 where a picture's own caption is among the k nearest; `texts` has a row per picture."""
    _, own, of_texts = distinct_captions([[caption] for caption in captions])
    ranks = retrieval_ranks(pictures, texts[[pictures_of[0] for pictures_of in of_texts]], own)
    return [int(rank < k) for rank in ranks]


def test_a_hit_is_the_own_caption_among_the_k_nearest() -> None:
    texts = np.eye(4)
    pictures = np.array([[1.0, 0.5, 0, 0], [0.9, 0.5, 0.1, 0], [0.5, 0.4, 0.3, 0.2], [0, 0, 0, 1.0]])
    captions = ["a", "b", "c", "d"]
    assert in_top(pictures, texts, captions, k=1) == [1, 0, 0, 1]
    assert in_top(pictures, texts, captions, k=2) == [1, 1, 0, 1]
    assert in_top(pictures, texts, captions, k=3) == [1, 1, 1, 1]


def test_equal_captions_count_once_and_a_constant_answer_does_not_win() -> None:
    texts = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    assert in_top(np.array([[1.0, 0]] * 3), texts, ["x", "x", "y"], k=1) == [1, 1, 0]
    constant = np.zeros((20, 3))
    hits = in_top(constant, np.random.RandomState(0).randn(20, 3), [str(i) for i in range(20)], k=5)
    assert hits == [0] * 20  # everything ties: the middle rank is 9.5


def test_ridge_finds_a_linear_map_with_either_gram_matrix() -> None:
    random = np.random.RandomState(0)
    for features in (5, 90):
        x, x_new = random.randn(60, features), random.randn(20, features)
        weight = np.zeros((features, 3))
        weight[:4] = random.randn(4, 3)
        groups = [str(i) for i in range(60)]
        error = ridge(x, x @ weight + 7, groups, x_new) - (x_new @ weight + 7)
        assert np.square(error).mean() < (1e-6 if features == 5 else 0.7 * np.square(x_new @ weight).mean())


def test_folds_keep_groups_together() -> None:
    groups = [f"g{i // 3}" for i in range(60)]
    fold = folds(groups)
    assert all(len({fold[i] for i in range(60) if groups[i] == g}) == 1 for g in set(groups))
    assert set(fold.tolist()) == {0, 1, 2, 3, 4}


def test_a_probe_separates_separable_classes_and_guesses_otherwise() -> None:
    random = np.random.RandomState(0)
    target = np.arange(120) % 3
    x = np.array([[4, 0], [0, 4], [-4, -4]])[target] + 0.5 * random.randn(120, 2)

    def accuracy(features: np.ndarray) -> float:
        train, test = features[:90], features[90:]
        groups = [str(i) for i in range(90)]
        scores = cross_validate(train, target[:90], 3, groups, logistic_regression, PENALTIES)
        penalty = max(scores, key=lambda p: scores[p])
        answers = logistic_regression(train, target[:90], 3, test, [penalty])[penalty]
        return float((answers == target[90:]).mean())

    assert accuracy(x) == 1.0
    assert accuracy(random.randn(120, 2)) < 0.6


def test_cross_validation_answers_each_sample_without_its_look_alikes() -> None:
    # Twins share a random label that their features give away: only a twin in training could know it.
    random = np.random.RandomState(0)
    x = np.repeat(random.randn(60, 4), 2, axis=0)
    target = np.repeat(random.randint(0, 2, 60), 2)

    def nearest(
        x_n: np.ndarray, y_n: np.ndarray, _: int, new: np.ndarray, __: object
    ) -> dict[float, np.ndarray]:
        return {1.0: y_n[np.square(new[:, None] - x_n).sum(2).argmin(1)]}

    apart = cross_validate(x, target, 2, [str(i) for i in range(120)], nearest, [1.0])
    together = cross_validate(x, target, 2, [str(i // 2) for i in range(120)], nearest, [1.0])
    assert apart[1.0] > 0.8
    assert together[1.0] < 0.65
    with pytest.raises(UserError, match="--group-by: all 120 training samples are of one group"):
        cross_validate(x, target, 2, ["same"] * 120, nearest, [1.0])


def test_k_larger_than_the_smallest_training_part_is_left_out_whichever_fold_comes_first() -> None:
    x, target = np.random.RandomState(0).randn(24, 4), np.arange(24) % 2
    # Ten look-alikes share a fold. Without it, 14 samples or fewer remain; without another, 20 or more.
    for order in (range(24), reversed(range(24))):
        groups = ["same" if i < 10 else str(i) for i in order]
        scores = cross_validate(x, target, 2, groups, knn, [1, 5, 20])
        assert set(scores) == {1, 5}
        assert all(0 <= accuracy <= 1 for accuracy in scores.values())


def test_an_interval_widens_when_look_alikes_are_resampled_together() -> None:
    scores = np.repeat(np.random.RandomState(1).rand(20), 10)
    alone = Bootstrap([str(i) for i in range(200)]).mean(scores)
    together = Bootstrap([str(i // 10) for i in range(200)]).mean(scores)
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    assert alone[0] < scores.mean() < alone[1]


def test_interpolation_is_exact_on_a_linear_gradient_inside_the_visible_patches() -> None:
    side, patch = 6, 4
    y, x = np.mgrid[0:24, 0:24] + 0.5
    picture = np.stack([x / 24, y / 24, (x + y) / 48])
    patches = patchify(torch.from_numpy(picture)[None], patch)[0].numpy()
    visible = np.array([0, 5, 30, 35, 14])
    found = interpolate(patches, visible, side, patch)
    inner = slice(patch // 2, -patch // 2)
    np.testing.assert_allclose(found[inner, inner], picture.transpose(1, 2, 0)[inner, inner], atol=1e-9)
    assert found[0, 0] == pytest.approx(found[1, 1], abs=0.1)  # outside: the nearest patch's colour


def test_histogram_and_pixels_of_a_plain_picture() -> None:
    red = np.zeros((10, 10, 3), np.uint8)
    red[..., 0] = 255
    histogram = colour_histogram(red)
    assert histogram.shape == (512,)
    assert histogram[7 * 64] == 1
    assert small_pixels(red).reshape(24, 24, 3)[3, 3].tolist() == [1, 0, 0]


def test_cosines_of_rows() -> None:
    found = cosines(np.array([[2.0, 0], [1, 1]]), np.array([[3.0, 0], [-1, -1]]))
    np.testing.assert_allclose(found, [1, -1])
