"""What the index of a split says of each picture's labels, or of its persons'. Torch-free."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.sources.emotic import DIMENSIONS
from uniemox_dist.config.finetune import FinetuneConfig, FinetuneRun
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.labelled import WHOLE
from uniemox_dist.data.reader import ShardReader


@dataclass(frozen=True)
class Sample:
    """What is learned from: a picture, or a person of one."""

    shard: int
    row: int
    person: int
    """Its number in the picture, or WHOLE."""
    key: str
    labels: tuple[str, ...]
    values: tuple[float, ...] = ()
    """Valence, arousal and dominance with task=multi; NaN where one is not known."""


def samples_of(
    reader: ShardReader, settings: FinetuneConfig, split: str, config: FinetuneRun
) -> list[Sample]:
    """What a split can be learned from: pictures, or the persons of pictures."""
    samples: list[Sample] = []
    unlabelled = 0
    for shard in range(len(reader.manifest.shards)):
        keys, labels, persons = reader.columns(shard, ["key", "label", "persons"])
        for row, (key, label, people) in enumerate(zip(keys, labels, persons)):
            if settings.task == "multi":
                samples += _of_persons(shard, row, key, people or [], settings.persons)
            elif label is None:
                unlabelled += 1
            else:
                samples.append(Sample(shard, row, WHOLE, key, (label,)))
    where = f"data.path={config.data.path}/{split}"
    if unlabelled:
        raise UserError(
            f"{where}: {unlabelled} of {reader.samples} pictures have no label; pack from a source with labels"
        )
    if not samples or (settings.task == "multi" and not any(sample.labels for sample in samples)):
        raise UserError(
            f"{where}: no person has categories of its own; pack EMOTIC with --layout emotic, or set "
            "finetune.task=single"
        )
    return samples


def _of_persons(shard: int, row: int, key: str, people: list[dict[str, Any]], each: bool) -> list[Sample]:
    """The annotated persons of a picture, one by one or together: then all their categories, and means of the rest."""
    annotated = [
        (number, facts) for number, person in enumerate(people) if (facts := _facts(person)) is not None
    ]
    if each:
        return [
            Sample(shard, row, number, key, tuple(facts["categories"]), _values([facts]))
            for number, facts in annotated
        ]
    if not annotated:
        return []
    everyone = [facts for _, facts in annotated]
    together = dict.fromkeys(label for facts in everyone for label in facts["categories"])
    return [Sample(shard, row, WHOLE, key, tuple(together), _values(everyone))]


def _facts(person: dict[str, Any]) -> dict[str, Any] | None:
    labels = json.loads(person["labels"]) if person.get("labels") else {}
    return labels if "categories" in labels else None


def _values(facts: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """Valence, arousal and dominance: the means of what is known, NaN where nothing is."""
    known = [[float(one[name]) for one in facts if one.get(name) is not None] for name in DIMENSIONS]
    return tuple(sum(values) / len(values) if values else float("nan") for values in known)
