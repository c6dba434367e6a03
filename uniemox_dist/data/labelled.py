"""A data set with targets: what is learned of its shards, and what each sample should be answered with. Torch-free.

Shape legend: n samples, C outputs (classes, or categories and then dimensions).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from uniemox_dist.data.reader import RawSample, ShardReader

WHOLE = -1
"""In place of a person's number: the picture with all its persons."""


class LabelledReader(ShardReader):
    """Chosen samples of a data set, numbered anew within each shard. A sample is a picture, or one person of it."""

    def __init__(
        self, of: ShardReader, items: Sequence[np.ndarray], targets: Sequence[np.ndarray], keys: Sequence[str]
    ) -> None:
        """Per shard: rows and persons' numbers (n×2 int64, WHOLE for a picture) and targets (n×C fp32; NaN where one is
        not known); `keys` are the pictures' of all samples in their order."""
        super().__init__(of.url, of.manifest, field=of.origin.field, verify_hash=of.verify_hash)
        self.origin = of.origin
        self.items, self.targets, self.keys = list(items), list(targets), list(keys)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.items))

    @property
    def targets_nC(self) -> np.ndarray:
        """The targets of all samples, in the order of the shards."""
        return np.concatenate(self.targets)

    def target(self, shard: int, item: int) -> np.ndarray:
        """The target of one sample."""
        row: np.ndarray = self.targets[shard][item]
        return row

    def read(self, shard: int, row: int) -> RawSample:
        at, person = self.items[shard][row].tolist()
        raw = super().read(shard, at)
        return raw if person == WHOLE else replace(raw, persons=(raw.persons[person],))

    def records(self, shard: int, rows: Sequence[int]) -> list[dict[str, Any]]:
        return super().records(shard, self.items[shard][list(rows), 0].tolist())

    def chosen(self, keep_n: np.ndarray) -> "LabelledReader":
        """Those of the samples that a mask over all of them keeps."""
        parts = np.split(keep_n, np.cumsum(self.counts)[:-1])
        keys = [key for key, keep in zip(self.keys, keep_n) if keep]
        items = [items[part] for items, part in zip(self.items, parts)]
        return LabelledReader(self, items, [t[part] for t, part in zip(self.targets, parts)], keys)
