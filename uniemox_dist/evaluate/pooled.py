"""Scores of several runs that differ in their seed alone, as one row of a table: mean, spread and interval.

Shape legend: S seeds, n held-out samples, C clusters of look-alikes, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """What several runs say together."""

    mean: float
    spread: float
    """Standard deviation of the seeds' means (over S - 1); 0 for one seed."""
    low: float
    high: float
    """Bounds of the 95 % interval."""
    by_seed: tuple[float, ...]


class Pool:
    """A bootstrap over clusters of samples and over seeds: each resample draws both with replacement.

    So an interval holds what other held-out pictures and other seeds would have changed. Few seeds understate the
    latter: the variance of S drawn ones is (S - 1)/S of what it should be, for three two thirds.
    All rows see the same draws, and those of a difference are paired by sample and by seed.
    """

    def __init__(self, clusters: Sequence[str], seeds: int, resamples: int = 2000) -> None:
        names = sorted(set(clusters))
        self.cluster_n = np.searchsorted(names, clusters)
        random = np.random.RandomState(0)
        # How often each cluster and each seed was drawn: sums over draws are then products of matrices.
        self.clusters_RC = random.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
        self.seeds_RS = random.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
        self.samples_R = self.clusters_RC @ np.bincount(self.cluster_n)

    def row(self, scores_Sn: np.ndarray) -> Row:
        """Mean and interval of one row's scores."""
        by_seed = scores_Sn.mean(axis=1)
        sums_CS = np.stack([np.bincount(self.cluster_n, scores) for scores in scores_Sn], axis=1)
        means_R = (self.clusters_RC @ sums_CS / self.samples_R[:, None] * self.seeds_RS).sum(axis=1)
        low, high = np.percentile(means_R, [2.5, 97.5])
        spread = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else 0.0
        return Row(float(by_seed.mean()), spread, float(low), float(high), tuple(map(float, by_seed)))

    def difference(self, a_Sn: np.ndarray, b_Sn: np.ndarray) -> Row:
        """a - b, sample by sample and seed by seed."""
        return self.row(a_Sn - b_Sn)
