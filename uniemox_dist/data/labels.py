"""Labelled samples of a data set: read from the index of its shards, and served with their targets. Torch-free.

A sample is a picture, or one person of a picture.
Shape legend: n samples, C outputs (classes, or categories followed by dimensions).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from uniemox_dist.config.finetune import FinetuneConfig, FinetuneRun
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.reader import RawSample, ShardReader

WHOLE_PICTURE = -1
"""Person number of a sample that is a whole picture with all its persons."""


@dataclass(frozen=True)
class LabelledSample:
    """A labelled picture, or a labelled person of one."""

    shard: int
    row: int
    person: int
    """Number of the person in the picture, or WHOLE_PICTURE."""
    key: str
    """Key of the picture."""
    labels: tuple[str, ...]
    values: tuple[float, ...] = ()
    """Of the learned dimensions; NaN where unknown."""
    shares: tuple[float, ...] = ()
    """Shares of the labels with target=distribution, with a sum of 1; empty otherwise."""


class LabelledReader(ShardReader):
    """Reads a subset of a data set's samples, numbered within each shard, with a target for each."""

    def __init__(
        self,
        reader: ShardReader,
        items: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        keys: Sequence[str],
    ) -> None:
        """
        Args:
            items: for each shard the samples' rows and person numbers, n×2 int64.
            targets: for each shard the samples' targets, n×C fp32; NaN where unknown.
            keys: the pictures' keys of all samples, in order.
        """
        super().__init__(
            reader.url, reader.manifest, field=reader.origin.field, verify_hash=reader.verify_hash
        )
        self.origin = reader.origin
        self.items, self.targets, self.keys = list(items), list(targets), list(keys)
        self.groups: list[str] | None = None
        """The group of look-alikes of each sample; None until the first evaluation reads them."""

    @property
    def counts(self) -> Sequence[int]:
        return tuple(map(len, self.items))

    @property
    def targets_nC(self) -> np.ndarray:
        """Targets of all samples, in the order of the shards."""
        return np.concatenate(self.targets)

    def target(self, shard: int, item: int) -> np.ndarray:
        """Returns the target of one sample, C."""
        row: np.ndarray = self.targets[shard][item]
        return row

    def read(self, shard: int, row: int) -> RawSample:
        picture, person = self.items[shard][row].tolist()
        raw = super().read(shard, picture)
        return raw if person == WHOLE_PICTURE else replace(raw, persons=(raw.persons[person],))

    def records(self, shard: int, rows: Sequence[int]) -> list[dict[str, Any]]:
        return super().records(shard, self.items[shard][list(rows), 0].tolist())

    def select(self, keep_n: np.ndarray) -> "LabelledReader":
        """Returns a reader of the samples where the mask `keep_n` is True."""
        parts = np.split(keep_n, np.cumsum(self.counts)[:-1])
        keys = [key for key, keep in zip(self.keys, keep_n) if keep]
        items = [items[part] for items, part in zip(self.items, parts)]
        return LabelledReader(self, items, [t[part] for t, part in zip(self.targets, parts)], keys)


def read_labelled_samples(
    reader: ShardReader, settings: FinetuneConfig, split: str, config: FinetuneRun
) -> list[LabelledSample]:
    """Reads the labelled samples of a split: its pictures, or the annotated persons (with task=multi, and with
    finetune.persons of pictures whose persons have labels of their own).

    A dimension that a picture lacks is the mean of its persons'.

    Raises:
        UserError: if a picture has no label (or no distribution, if that is the target), with task=multi no person has
            categories, or with target=dimensions nothing has a value.
    """
    if settings.target == "dimensions":
        return _read_valued_samples(reader, settings, f"data.path={config.data.path}/{split}")
    samples: list[LabelledSample] = []
    unlabelled = unlabelled_with_persons = 0
    dimensions = settings.learned_dimensions
    target = "label_distribution" if settings.target == "distribution" else "label"
    for shard in range(len(reader.manifest.shards)):
        if settings.task == "multi":
            for row, (key, people) in enumerate(zip(*reader.columns(shard, ["key", "persons"]))):
                samples += _list_person_samples(
                    shard, row, key, people or [], dimensions, each=settings.persons
                )
            continue
        columns = zip(*reader.columns(shard, ["key", target, "persons", *dimensions]))
        for row, (key, stated, people, *values) in enumerate(columns):
            persons = [_parse_labels(person) for person in people or ()]
            own = [(i, labels) for i, labels in enumerate(persons) if isinstance(labels.get("label"), str)]
            if target == "label" and settings.persons and own:
                samples += [
                    LabelledSample(shard, row, i, key, (labels["label"],), mean_values([labels], dimensions))
                    for i, labels in own
                ]
            elif stated is None:
                unlabelled += 1
                unlabelled_with_persons += bool(own)
            else:
                labels, shares = ((stated,), ()) if target == "label" else _parse_shares(stated)
                means = mean_values(persons, dimensions)
                known = tuple(mean if value is None else value for value, mean in zip(values, means))
                samples.append(LabelledSample(shard, row, WHOLE_PICTURE, key, labels, known, shares))
    where = f"data.path={config.data.path}/{split}"
    if unlabelled:
        if target == "label_distribution":
            fix = "distribution; pack from a source with distributions, or set finetune.target=label"
            if unlabelled < reader.samples:
                fix = "distribution; `uniemox shards select --filter 'distribution is not None'` drops them"
        elif unlabelled_with_persons:
            fix = "label, but persons with different ones; set finetune.persons=true, which learns each person's label"
        elif _have_ties(reader):
            fix = (
                "label, but distributions whose largest share several labels have; leave them out (uniemox shards "
                'select … --filter "label is not None"), or set finetune.target=distribution'
            )
        else:
            fix = "label; pack from a source with labels, or set finetune.target=dimensions to learn values alone"
        raise UserError(f"{where}: {unlabelled} of {reader.samples} pictures have no {fix}")
    if not samples or (settings.task == "multi" and not any(sample.labels for sample in samples)):
        raise UserError(
            f"{where}: no person has categories of its own; pack EMOTIC with --layout emotic, or set "
            "finetune.task=single"
        )
    return samples


def _read_valued_samples(reader: ShardReader, settings: FinetuneConfig, where: str) -> list[LabelledSample]:
    """Reads the samples of a split that have a value of a learned dimension: its pictures, or with finetune.persons the
    persons of pictures whose persons have values."""
    dimensions = settings.learned_dimensions
    samples: list[LabelledSample] = []
    for shard in range(len(reader.manifest.shards)):
        columns = zip(*reader.columns(shard, ["key", "persons", *dimensions]))
        for row, (key, people, *values) in enumerate(columns):
            persons = [_parse_labels(person) for person in people or ()]
            of_each = [mean_values([labels], dimensions) for labels in persons]
            if settings.persons and any(map(_has_any, of_each)):
                found = list(enumerate(of_each))
            else:
                means = mean_values(persons, dimensions)
                own = tuple(mean if value is None else value for value, mean in zip(values, means))
                found = [(WHOLE_PICTURE, own)]
            samples += [LabelledSample(shard, row, i, key, (), own) for i, own in found if _has_any(own)]
    if not samples:
        raise UserError(
            f"{where}: nothing has a number as its {' or '.join(dimensions)}; pack from a source that states values, "
            "or set finetune.target=label"
        )
    return samples


def _has_any(values: Sequence[float]) -> bool:
    return not all(map(math.isnan, values))


def _have_ties(reader: ShardReader) -> bool:
    """Whether a picture has a distribution and no label."""
    return any(
        label is None and distribution is not None
        for shard in range(len(reader.manifest.shards))
        for label, distribution in zip(*reader.columns(shard, ["label", "label_distribution"]))
    )


def _list_person_samples(
    shard: int, row: int, key: str, people: list[dict[str, Any]], dimensions: Sequence[str], *, each: bool
) -> list[LabelledSample]:
    """Lists the annotated persons of a picture one by one (`each`), or as one sample.

    The one sample has all their categories, and the means of their values.
    """
    annotated = [
        (number, labels)
        for number, person in enumerate(people)
        if "categories" in (labels := _parse_labels(person))
    ]
    if each:
        return [
            LabelledSample(
                shard, row, number, key, tuple(labels["categories"]), mean_values([labels], dimensions)
            )
            for number, labels in annotated
        ]
    if not annotated:
        return []
    everyone = [labels for _, labels in annotated]
    categories = dict.fromkeys(name for labels in everyone for name in labels["categories"])
    return [
        LabelledSample(shard, row, WHOLE_PICTURE, key, tuple(categories), mean_values(everyone, dimensions))
    ]


def _parse_labels(person: dict[str, Any]) -> dict[str, Any]:
    """A person's own labels; empty for a detected person."""
    text = person.get("labels") or "{}"
    labels: dict[str, Any] = {} if text == "{}" else json.loads(text)
    return labels


def _parse_shares(text: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The labels of a distribution with a share above 0, and their shares divided by the sum."""
    found = {label: share for label, share in json.loads(text).items() if share > 0}
    total = sum(found.values())
    return tuple(found), tuple(share / total for share in found.values())


def mean_values(people: Sequence[dict[str, Any]], dimensions: Sequence[str]) -> tuple[float, ...]:
    """Returns the means of the known values of each dimension over the labels of some persons; NaN where none is
    known."""
    known = [
        [float(one[name]) for one in people if isinstance(one.get(name), int | float)] for name in dimensions
    ]
    return tuple(sum(values) / len(values) if values else float("nan") for values in known)
