"""Every sample of a data set once, over any number of ranks: what an evaluation reads.

No rank gets a sample that another has, none is padded, and the last batch of a rank is as short as it is.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import ViewSettings, plan_evaluation_views
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.step_batches import set_up_worker
from uniemox_dist.data.views import allocate_views, render

Place = tuple[int, int]
"""Shard and row."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Some samples in the order of the data set. Shapes: B samples."""

    numbers: tuple[int, ...]
    """Of the samples, counted over the whole data set in the order of its shards."""
    scene_B3HW: Tensor
    """uint8: the whole picture."""
    person_B3HW: Tensor
    """uint8: the person's crop, or the whole picture."""
    records: tuple[dict[str, Any], ...]
    """The samples' `.json` members, with their `key`."""


def rank_range(samples: int, rank: int, world_size: int) -> range:
    """The samples of one rank: neighbours, and at most one more than any other rank has."""
    return range(samples * rank // world_size, samples * (rank + 1) // world_size)


class EvaluationDataset(Dataset[EvaluationBatch | str]):
    """`dataset[i]` is the i-th batch of one rank; a text where a sample cannot be used, and why."""

    def __init__(
        self,
        reader: ShardReader,
        settings: ViewSettings,
        batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        records: bool = True,
    ) -> None:
        """Without `records` those of a batch hold their keys alone: a second read of each sample is saved."""
        self.with_records = records
        self.reader, self.settings, self.batch = reader, settings, batch
        self.own = rank_range(reader.samples, rank, world_size)
        counts = torch.tensor(reader.counts)
        self._ends = counts.cumsum(0)

    def __len__(self) -> int:
        return -(-len(self.own) // self.batch)

    def __getitem__(self, index: int) -> EvaluationBatch | str:
        numbers = self.own[index * self.batch : (index + 1) * self.batch]
        places = [self._place(number) for number in numbers]
        size = self.settings.image_size
        scene_B3HW, person_B3HW = allocate_views(len(numbers), size), allocate_views(len(numbers), size)
        keys = []
        for i, (shard, row) in enumerate(places):
            try:
                raw = self.reader.read(shard, row)
                plan = plan_evaluation_views(raw.width, raw.height, raw.persons, self.settings)
                render(raw.image, (raw.width, raw.height), plan, scene_B3HW[i], person_B3HW[i])
                keys.append(raw.key)
            except UserError as error:
                return str(error)
            except ValueError as error:
                # A sample that is left out would change every figure: that is for a person to decide.
                name = self.reader.manifest.shards[shard].name
                return f"DATA={self.reader.url}: {name}, row {row}: {error}; pack again"
        records = [{**record, "key": key} for record, key in zip(self._records(places), keys)]
        return EvaluationBatch(tuple(numbers), scene_B3HW, person_B3HW, tuple(records))

    def _place(self, number: int) -> Place:
        shard = int(torch.searchsorted(self._ends, number, right=True))
        return shard, number - (int(self._ends[shard - 1]) if shard else 0)

    def _records(self, places: Sequence[Place]) -> Iterator[dict[str, Any]]:
        if not self.with_records:
            yield from ({} for _ in places)
            return
        for shard in dict.fromkeys(shard for shard, _ in places):
            yield from self.reader.records(shard, [row for of, row in places if of == shard])


def evaluation_batches(
    reader: ShardReader,
    settings: ViewSettings,
    *,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    records: bool = True,
) -> Iterator[EvaluationBatch]:
    """The batches of one rank, in the order of the data set.

    Raises:
        UserError: naming the first sample that cannot be used.
    """
    dataset = EvaluationDataset(reader, settings, batch, rank=rank, world_size=world_size, records=records)
    # As in training, they leave signals to the process that they work for, and die with it.
    start, parent = (set_up_worker, os.getpid()) if workers else (None, 0)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=None if start is None else lambda _: start(parent),
    )
    with closing(reader):
        for found in loader:
            if isinstance(found, str):
                raise UserError(found)
            yield found
