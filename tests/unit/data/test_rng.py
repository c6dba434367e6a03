"""The integer hash behind every random decision. Its values are frozen, because they define the order of samples."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniemox_dist.data.rng import Purpose, choice, largest_remainder, mix64, permutation, uniform


def test_the_hash_keeps_its_values() -> None:
    assert [mix64(), mix64(0), mix64(1), mix64(0, 1), mix64(2**64 - 1, 7)] == [
        11400714819323198485,
        15041319014400591657,
        1217233615517328540,
        14335451749947300952,
        16996782633387510532,
    ]


def test_a_permutation_keeps_its_values() -> None:
    assert permutation(12, 0).tolist() == [6, 3, 1, 5, 10, 7, 4, 11, 8, 2, 0, 9]
    assert permutation(12, 3, 1, 4).tolist() == [4, 3, 6, 10, 8, 9, 2, 0, 11, 1, 5, 7]


def test_the_purposes_keep_their_numbers() -> None:
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "CAPTION": 1,
        "SCENE_AREA": 2,
        "SCENE_ASPECT": 3,
        "SCENE_X": 4,
        "SCENE_Y": 5,
        "SCENE_FLIP": 6,
        "PERSON": 7,
        "PERSON_FLIP": 8,
        "BACKGROUND": 9,
        "SCENE_JITTER": 10,
        "PERSON_JITTER": 11,
        "CACHED_VIEW": 12,
        "AUGMENT": 13,
        "MIX": 14,
    }


@given(st.integers(0, 2**64 - 1), st.integers(0, 63))
def test_one_changed_bit_changes_about_half_of_the_hash(key: int, bit: int) -> None:
    assert 8 <= (mix64(key) ^ mix64(key ^ (1 << bit))).bit_count() <= 56


def test_neighbouring_slots_draw_uniform_and_uncorrelated_numbers() -> None:
    n = 20_000
    x = np.array([uniform(5, slot, Purpose.SCENE_X) for slot in range(n)])
    y = np.array([uniform(5, slot, Purpose.SCENE_Y) for slot in range(n)])
    assert 0 <= x.min() < x.max() < 1
    for low in np.arange(0, 1, 0.1):
        share = ((x >= low) & (x < low + 0.1)).mean()
        assert abs(share - 0.1) < 4 * math.sqrt(0.09 / n)
    for a, b in ((x, y), (x[:-1], x[1:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(n)


@given(st.integers(0, 300), st.integers(0, 2**31), st.integers(0, 2**31))
def test_a_permutation_holds_every_number_once(n: int, a: int, b: int) -> None:
    assert sorted(permutation(n, a, b).tolist()) == list(range(n))


def test_every_element_is_equally_often_at_every_place_of_a_permutation() -> None:
    n, times = 6, 6000
    counts = np.zeros((n, n))
    for key in range(times):
        counts[np.arange(n), permutation(n, key)] += 1
    assert np.abs(counts / times - 1 / n).max() < 4 * math.sqrt((1 / n) * (1 - 1 / n) / times)


def test_a_choice_is_within_its_range_and_reaches_all_of_it() -> None:
    assert {choice(3, 1, slot) for slot in range(100)} == {0, 1, 2}
    assert {choice(1, 1, slot) for slot in range(10)} == {0}


def plain_largest_remainder(weights: list[int], total: int) -> list[int]:
    exact = [Fraction(weight * total, sum(weights)) for weight in weights]
    shares = [math.floor(value) for value in exact]
    by_rest = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_rest[: total - sum(shares)]:
        shares[i] += 1
    return shares


@settings(max_examples=200)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=6), st.sampled_from([8, 12, 96, 100]))
def test_shares_follow_the_largest_remainders_and_add_up(weights: list[int], total: int) -> None:
    shares = largest_remainder(weights, total).tolist()
    assert sum(shares) == total
    exact = [weight * total / sum(weights) for weight in weights]
    assert all(abs(share - value) < 1 for share, value in zip(shares, exact))
    rests = [value % 1 for value in exact]
    if all(abs(a - b) > 1e-9 for i, a in enumerate(rests) for b in rests[:i]):  # no ties by rounding
        assert shares == plain_largest_remainder(weights, total)


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [([1], 12, [12]), ([1, 1], 3, [2, 1]), ([0.7, 0.2, 0.1], 12, [9, 2, 1]), ([1, 1e-9], 4, [4, 0])],
)
def test_shares_of_simple_weights(weights: list[float], total: int, expected: list[int]) -> None:
    assert largest_remainder(weights, total).tolist() == expected
