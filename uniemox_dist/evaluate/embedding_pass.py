"""One pass over each split of a data set: every sample once, in the order of its shards; pictures are not kept.

Only a batch of pictures and the vectors of all samples are in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.format.sample import DIMENSIONS
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.evaluation_batches import EvaluationBatch, evaluation_batches
from uniemox_dist.data.labels import mean_values
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.evaluate.intervals import find_group
from uniemox_dist.evaluate.subject import Rows, join

BATCH = 64


@dataclass(frozen=True)
class Split:
    """One split of a data set, embedded."""

    path: str
    identity: str
    keys: list[str]
    labels: list[str | None]
    captions: list[list[str]]
    groups: list[str]
    """The group of look-alikes of each sample. Samples of one group are resampled together and are in one fold."""
    attributes: list[dict[str, Any]]
    """Attributes of each sample. Valence, arousal and dominance that it lacks are the means of its persons'."""
    distributions: list[dict[str, float] | None]
    """Labels and their shares of each sample; None if it has no distribution."""
    rows: Rows

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def facts(self) -> dict[str, Any]:
        """The entry of this split in a result's `data`."""
        return {"path": self.path, "identity": self.identity, "samples": len(self)}


def embed_splits(
    readers: dict[str, ShardReader],
    settings: ViewSettings,
    embed: Callable[[str, EvaluationBatch], Rows],
    *,
    group_by: str | None,
    workers: int = 0,
) -> dict[str, Split]:
    """Embeds each split, with a progress bar over all of them.

    Args:
        embed: returns the rows of one batch of a role.
        group_by: attribute that names a sample's group. Each sample without it is its own group.
        workers: processes that decode pictures.
    """
    found: dict[str, Split] = {}
    total = sum(reader.manifest.samples for reader in readers.values())
    with tqdm(total=total, desc="embedding", unit=" pictures", disable=None) as bar:
        for role, reader in readers.items():
            parts: list[Rows] = []
            records: list[dict[str, Any]] = []
            for batch in evaluation_batches(reader, settings, batch=BATCH, workers=workers):
                parts.append(embed(role, batch))
                records += batch.records
                bar.update(len(batch.records))
            found[role] = Split(
                str(reader.folder),
                reader.manifest.identity,
                [record["key"] for record in records],
                [record["label"] for record in records],
                [record["captions"] for record in records],
                [find_group(record, group_by) for record in records],
                [_attributes(record) for record in records],
                [record.get("label_distribution") for record in records],
                join(parts),
            )
    return found


def _attributes(record: dict[str, Any]) -> dict[str, Any]:
    own = record.get("attributes") or {}
    persons = record.get("persons")
    people = [person.get("labels") or {} for person in persons] if isinstance(persons, list) else []
    means = zip(DIMENSIONS, mean_values(people, DIMENSIONS))
    return {**{name: mean for name, mean in means if not np.isnan(mean)}, **own}
