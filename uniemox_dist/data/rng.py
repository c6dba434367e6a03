"""Random numbers for data: pure functions of integers, equal on every machine, library version and device.

The streams of numpy's `Generator` methods and of torch's generators may change between versions; an integer hash does
not. This module works on Python integers; masks.py has a similar hash on tensors.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

_M64 = (1 << 64) - 1


class Purpose(IntEnum):
    """Purposes of random numbers. The values are part of the order of samples: never renumber them."""

    CAPTION = 1
    SCENE_AREA = 2
    SCENE_ASPECT = 3
    SCENE_X = 4
    SCENE_Y = 5
    SCENE_FLIP = 6
    PERSON = 7
    PERSON_FLIP = 8
    BACKGROUND = 9
    SCENE_JITTER = 10
    PERSON_JITTER = 11
    CACHED_VIEW = 12
    AUGMENT = 13
    MIX = 14


def mix64(*keys: int) -> int:
    """Returns a 64-bit hash of a sequence of integers (a chain of splitmix64 finalisers, Steele et al. 2014)."""
    x = 0x9E3779B97F4A7C15
    for key in keys:
        x = ((x ^ (key & _M64)) * 0xBF58476D1CE4E5B9) & _M64
        x ^= x >> 29
        x = (x * 0x94D049BB133111EB) & _M64
        x ^= x >> 32
    return x


def uniform(*keys: int) -> float:
    """Returns a number in [0, 1) with 53 random bits."""
    return (mix64(*keys) >> 11) / (1 << 53)


def permutation(n: int, *keys: int) -> np.ndarray:
    """Returns a permutation of 0…n-1 (int64): sorts raw Philox words, a stream that numpy guarantees not to change."""
    words = np.random.Philox(key=mix64(*keys)).random_raw(n)
    return np.argsort(words, kind="stable")


def choice(n: int, *keys: int) -> int:
    """Returns an index in 0…n-1."""
    return mix64(*keys) % n


def largest_remainder(weights: Sequence[float], total: int) -> np.ndarray:
    """Splits `total` into integers in proportion to `weights` that add up to it; of equal remainders the first wins."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    for i in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[i] += 1
    return shares
