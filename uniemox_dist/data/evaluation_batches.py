"""Batches for evaluation: every sample of a data set exactly once, over any number of ranks.

Ranks have disjoint samples without padding, so the last batch of a rank may be shorter.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from uniemox_dist.core.errors import UserError
from uniemox_dist.data.batch_loader import worker_setup
from uniemox_dist.data.crops import ViewSettings, plan_evaluation_views
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.views import allocate_views, render

Place = tuple[int, int]
"""(shard, row)."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Consecutive samples of the data set. Shapes: B samples."""

    numbers: tuple[int, ...]
    """Numbers of the samples, counted over the whole data set in the order of its shards."""
    scene_B3HW: Tensor
    """uint8: the whole picture."""
    person_B3HW: Tensor
    """uint8: the person's crop, or the whole picture."""
    records: tuple[dict[str, Any], ...]
    """The samples' `.json` members, with key, label and captions of the index."""


def rank_range(samples: int, rank: int, world_size: int) -> range:
    """Returns the consecutive samples of one rank. Numbers of samples differ by at most one between ranks."""
    return range(samples * rank // world_size, samples * (rank + 1) // world_size)


class EvaluationDataset(Dataset[EvaluationBatch | str]):
    """`dataset[i]` is the i-th batch of one rank, or an error text if a sample cannot be used."""

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
        """With `records=False` the records contain only fields of the index, which saves a second read of each
        sample."""
        self.with_records = records
        self.reader, self.settings, self.batch = reader, settings, batch
        self.own = rank_range(reader.samples, rank, world_size)
        counts = torch.tensor(list(reader.counts))
        self._ends = counts.cumsum(0)

    def __len__(self) -> int:
        return -(-len(self.own) // self.batch)

    def __getitem__(self, index: int) -> EvaluationBatch | str:
        numbers = self.own[index * self.batch : (index + 1) * self.batch]
        places = [self._locate(number) for number in numbers]
        size = self.settings.image_size
        scene_B3HW, person_B3HW = allocate_views(len(numbers), size), allocate_views(len(numbers), size)
        fields = []
        for i, (shard, row) in enumerate(places):
            try:
                raw = self.reader.read(shard, row)
                plan = plan_evaluation_views(raw.width, raw.height, raw.persons, self.settings)
                render(raw.image, (raw.width, raw.height), plan, scene_B3HW[i], person_B3HW[i])
                fields.append({"key": raw.key, "label": raw.label, "captions": list(raw.captions)})
            except UserError as error:
                return str(error)
            except ValueError as error:
                # Leaving out a sample would change every result, so the user must decide.
                name = self.reader.manifest.shards[shard].name
                return f"DATA={self.reader.url}: {name}, row {row}: {error}; pack again"
        records = tuple({**record, **own} for record, own in zip(self._records(places), fields))
        return EvaluationBatch(tuple(numbers), scene_B3HW, person_B3HW, records)

    def _locate(self, number: int) -> Place:
        shard = int(torch.searchsorted(self._ends, number, right=True))
        return shard, number - (int(self._ends[shard - 1]) if shard else 0)

    def _records(self, places: Sequence[Place]) -> Iterator[dict[str, Any]]:
        if not self.with_records:
            yield from ({} for _ in places)
            return
        for shard in dict.fromkeys(shard for shard, _ in places):
            yield from self.reader.records(shard, [row for other, row in places if other == shard])


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
    """Yields the batches of one rank in the order of the data set.

    Raises:
        UserError: naming the first sample that cannot be used.
    """
    dataset = EvaluationDataset(reader, settings, batch, rank=rank, world_size=world_size, records=records)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        # As in training, workers ignore signals and die with the process that started them.
        worker_init_fn=worker_setup(),
    )
    with closing(reader):
        for batch_or_error in loader:
            if isinstance(batch_or_error, str):
                raise UserError(batch_or_error)
            yield batch_or_error
