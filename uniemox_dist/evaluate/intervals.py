"""95 % intervals by one cluster bootstrap: for single scores, for statistics, and for scores of several seeds.

Look-alikes are not independent observations. Each resample therefore draws whole groups of samples with replacement
(Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8), and an interval spans the 2.5th to
the 97.5th percentile of the resampled values.

Shape legend: S seeds, n samples, C groups of look-alikes, R resamples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOOK_ALIKES = "family"
"""Attribute of a sample that names its group of look-alikes, unless the user names another one."""
RESAMPLES = 1000
BOUNDS = (2.5, 97.5)
"""Percentiles that bound the interval."""


def find_group(record: dict[str, Any], attribute: str | None) -> str:
    """The group of look-alikes of a sample: the value of an attribute, or its key if it lacks the attribute or none is
    given.

    Args:
        record: the sample's `.json` member with an added `key`.
    """
    attributes = record.get("attributes")
    own = attributes.get(attribute) if isinstance(attributes, dict) and attribute else None
    return str(record["key"] if own is None else own)


@dataclass(frozen=True)
class Row:
    """The scores of several seeds as one row of a table."""

    mean: float
    spread: float
    """Standard deviation of the seeds' means (over S - 1); 0 for one seed."""
    low: float
    high: float
    """Bounds of the 95 % interval."""
    by_seed: tuple[float, ...]


class Bootstrap:
    """Intervals over a fixed set of samples. All intervals of one instance use the same draws.

    Only the counts of one resample are in memory at a time, so that test splits may be large.
    """

    def __init__(self, groups: Sequence[str], resamples: int = RESAMPLES) -> None:
        """`groups` names the group of each sample; with a different group for each sample, single samples are
        resampled."""
        names = sorted(set(groups))
        number = {name: i for i, name in enumerate(names)}
        self.group_n = np.array([number[group] for group in groups], dtype=np.int64)
        self.size_C = np.bincount(self.group_n, minlength=len(names))
        self.resamples = resamples

    def mean(self, scores_n: np.ndarray) -> tuple[float, float]:
        """The interval of the mean of some scores, one per sample."""
        return bounds(self._resampled_means(scores_n[None])[:, 0])

    def means(self, scores_Sn: np.ndarray) -> list[tuple[float, float]]:
        """The intervals of the means of several scores, S rows of one value per sample."""
        return list(map(bounds, self._resampled_means(scores_Sn).T))

    def moments(self, values_nK: np.ndarray) -> np.ndarray:
        """Means over the samples of each resample, R×K, of K values per sample; for statistics of moments, such as a
        correlation, which are computed for all resamples at once."""
        return self._resampled_means(values_nK.T)

    def statistic(self, value: Callable[[np.ndarray], float]) -> tuple[float, float]:
        """The interval of any statistic; `value` takes sample numbers, some of them repeated."""
        by_group = np.split(np.argsort(self.group_n, kind="stable"), np.cumsum(self.size_C)[:-1])
        return bounds(
            np.array([value(np.concatenate([by_group[i] for i in drawn])) for drawn in self._draws()])
        )

    def row(self, scores_Sn: np.ndarray) -> Row:
        """The mean over seeds with its interval. Each resample draws groups and seeds, both with replacement, so that
        the interval covers other held-out samples and other seeds.

        Few seeds understate the latter: the variance of S drawn seeds is (S - 1)/S of the true one.
        """
        by_seed, seeds = scores_Sn.mean(axis=1), len(scores_Sn)
        weight_RS = (
            np.random.RandomState(1).multinomial(seeds, np.full(seeds, 1 / seeds), self.resamples) / seeds
        )
        low, high = bounds((self._resampled_means(scores_Sn) * weight_RS).sum(axis=1))
        spread = float(by_seed.std(ddof=1)) if seeds > 1 else 0.0
        return Row(float(by_seed.mean()), spread, low, high, tuple(map(float, by_seed)))

    def difference(self, a_Sn: np.ndarray, b_Sn: np.ndarray) -> Row:
        """`row` of a - b, paired by sample and by seed."""
        return self.row(a_Sn - b_Sn)

    def _resampled_means(self, scores_Sn: np.ndarray) -> np.ndarray:
        """Means over the samples of each resample, R×S."""
        groups = len(self.size_C)
        sums_CS = np.stack([np.bincount(self.group_n, scores, groups) for scores in scores_Sn], axis=1)
        counts = (np.bincount(drawn, minlength=groups) for drawn in self._draws())
        return np.stack([count_C @ sums_CS / (count_C @ self.size_C) for count_C in counts])

    def _draws(self) -> Iterator[np.ndarray]:
        random, groups = np.random.RandomState(0), len(self.size_C)
        for _ in range(self.resamples):
            yield random.randint(0, groups, groups)


def bounds(values_R: np.ndarray) -> tuple[float, float]:
    """The interval of a statistic's values of all resamples; NaN, where one is not defined, do not count."""
    low, high = np.nanpercentile(values_R, BOUNDS)
    return float(low), float(high)
