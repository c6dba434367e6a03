"""The packer: takes prepared records in the order of packing, drops copies, writes shards and journals them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from shards.format.encode import Encoded
from shards.format.entries import ShardEntry
from shards.format.index import OPTIONAL, index_path, read_index
from shards.format.writer import ShardWriter
from shards.pack.append import Existing
from shards.pack.duplicates import PackedSamples
from shards.pack.journal import Journal, Step
from shards.pack.listing import Listing
from shards.pack.near_duplicates import NEAR_DUPLICATE, Twins, mark_line
from shards.pack.partial import delete_leftovers
from shards.pack.prepare import Batch, Preparation, Ready, Rejected
from shards.pack.remote import RemoteJournal
from shards.pack.settings import PackSettings
from shards.pack.spool import parse_record
from shards.pack.workers import Task, Workers
from shards.pictures.formats import BadPicture
from shards.pool import Progress
from shards.sources import Findings
from shards.sources.tables import CellReader

CHUNK = 16
"""Records per task: amortises the transfer to a worker, and fills a detector batch."""
RECENT = 1000
"""Last records of an interrupted pack whose servers count as having answered."""


@dataclass
class PackResult:
    """The result of a pack. `records` is always the sum of `packed` plus the number of `rejected`."""

    folders: list[Path] = field(default_factory=list)
    records: int = 0
    packed: Counter[str] = field(default_factory=Counter)
    with_person: int = 0
    contents: Counter[str] = field(default_factory=Counter)
    """`captions`, `labels` and `boxes` of the samples; samples with a `label_distribution`, `valence`, `arousal` and
    `dominance`, and those `without_caption`, `without_label`, `without_box`."""
    rows: tuple[int, int] = (0, 0)
    """Rows of the whole source, and the pictures that they describe."""
    findings: Findings = field(default_factory=Findings)
    rejected: list[Rejected] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)
    """Packed pictures that were converted, by their original format."""
    reused: bool = False
    resumed: int = 0
    """Records that were done before an interruption."""


class Packer:
    """Packs the records of a listing, from where the journal ends."""

    def __init__(
        self,
        settings: PackSettings,
        folder: Path,
        listing: Listing,
        part: tuple[int, int] | None,
        journal: Journal | RemoteJournal,
        progress: Progress | None,
        existing: Existing | None = None,
        only: frozenset[int] | None = None,
    ) -> None:
        """`only` are the numbers of the records that are packed; None: all of the part."""
        self.settings, self.folder, self.listing = settings, folder, listing
        self.journal, self.progress, self.existing = journal, progress, existing
        self.prefix = "" if part is None else f"p{part[0]:03d}-"
        self.order_M, self.piece_M = listing.order(part)
        if only is not None:
            is_packed_M = np.isin(self.order_M, np.array(sorted(only), np.int64))
            self.order_M, self.piece_M = self.order_M[is_packed_M], self.piece_M[is_packed_M]
        self.result = PackResult(records=len(self.order_M), rows=(listing.rows, len(listing.spool)))
        self.writers: dict[str, ShardWriter] = {}
        self.packed = PackedSamples(listing, existing)
        self.position = 0
        """Number of records processed so far, in the order of packing."""
        self.twins: Twins = {}
        """Near-copies among the records; empty with --near-duplicates keep."""
        self._kept: set[int] = set()  # the packed records, if there are twins
        self._refused: list[tuple[int, Rejected]] = []  # since the last journal step
        self._converted: Counter[str] = Counter()  # likewise

    def run(self, preparation: Preparation, workers: Workers) -> None:
        """Packs all remaining records."""
        for step in self.journal.steps():
            self._replay(step)
        delete_leftovers(self.folder, {name: writer.entries for name, writer in self.writers.items()})
        self.result.resumed = self.position
        preparation = replace(preparation, answered=(*preparation.answered, *self._answered()))
        if self.progress is not None:
            self.progress.total = len(self.order_M)
            self.progress.update(self.position)
        try:
            for task, batch in workers.prepare(self.tasks(self.position), preparation):
                self._consume(task, batch)
                if self.progress is not None:
                    self.progress.update(len(task.numbers))
            for writer in self.writers.values():
                writer.close()
        finally:
            for writer in self.writers.values():
                writer.wait()  # also after an error, so that full shards are completed
            self.journal.wait()

    def _answered(self) -> list[str]:
        """The URL of a picture from each kind of server that answered an interrupted pack, among its last records."""
        refused = {rejected.source for rejected in self.result.rejected}
        found: dict[str, str] = {}
        for number in self.order_M[max(0, self.position - RECENT) : self.position].tolist():
            record = parse_record(self.listing.spool.line(number))
            if isinstance(record.image, str) and "://" in record.image and record.name not in refused:
                found[record.image.partition("://")[0].lower()] = record.image
        return list(found.values())

    @property
    def has_only_copies(self) -> bool:
        """Whether every record is a copy of a picture that was packed before."""
        reasons = {rejected.reason for rejected in self.result.rejected}
        return not self.writers and reasons == {"duplicate"}

    def tasks(self, first: int = 0) -> Iterator[Task]:
        """The records in the order of packing, from position `first`."""
        cells = CellReader(allow_outside=self.settings.allow_outside)
        spool = self.listing.spool
        for start in range(first, len(self.order_M), CHUNK):
            numbers = self.order_M[start : start + CHUNK].tolist()
            lines = [spool.line(number) for number in numbers]
            if self.twins and self.settings.near_duplicates == "mark":
                lines = [
                    mark_line(line, self.twins, number, self._name) for line, number in zip(lines, numbers)
                ]
            images: list[bytes | str | BadPicture | None] = [None] * len(numbers)
            for i, piece in enumerate(self.piece_M[start : start + CHUNK].tolist()):
                if piece >= 0 and (cell := self.listing.cell(lines[i])) is not None:
                    images[i] = cells.read(cell, piece)
            yield Task(numbers, lines, images)

    def _consume(self, task: Task, batch: Batch) -> None:
        data, offset = memoryview(batch.data), 0
        for number, item in zip(task.numbers, batch.items):
            if isinstance(item, Ready):
                encoded = Encoded(data[offset : offset + item.length], item.image_length, item.fields)
                offset += item.length
                refusal = self.packed.check(number, item.fields["key"], item.fields["image_sha256"])
                refusal = refusal or self._near_duplicate(number)
                if refusal is None:
                    self._write(number, encoded)
                    if item.converted is not None:
                        self._converted[item.converted] += 1
                        self.result.converted[item.converted] += 1
                else:
                    item = Rejected(item.source, *refusal)
            if isinstance(item, Rejected):
                self.result.rejected.append(item)
                self._refused.append((number, item))
            self.position += 1

    def _near_duplicate(self, number: int) -> tuple[str, str] | None:
        """(reason, detail) if near-copies are dropped and one of this record's was packed."""
        if self.settings.near_duplicates != "drop" or not self.twins:
            return None
        for twin, kind in self.twins.get(number, []):
            if twin in self._kept:
                split = self.listing.split(twin)
                return NEAR_DUPLICATE, f"{kind}: {self._name(twin)}{f' of split {split}' if split else ''}"
        self._kept.add(number)
        return None

    def _name(self, number: int) -> str:
        return parse_record(self.listing.spool.line(number)).name

    def _write(self, number: int, sample: Encoded) -> None:
        name = self.listing.split(number)
        if name not in self.writers:
            for writer in self.writers.values():
                writer.close()  # splits come one after the other, so only one shard is open
            self.writers[name] = self._writer(name)
        self.writers[name].add_encoded(sample)
        self.result.packed[name] += 1
        self._count(
            sample.fields["captions"],
            sample.fields["label"],
            len(sample.fields["persons"]),
            [sample.fields.get(name) for name in OPTIONAL.names],
        )

    def _count(self, captions: list[str], label: str | None, persons: int, optional: Sequence[Any]) -> None:
        self.result.with_person += persons > 0
        self.result.contents.update(
            captions=len(captions),
            labels=int(label is not None),
            boxes=persons,
            without_caption=int(not captions),
            without_label=int(label is None),
            without_box=int(not persons),
            **{name: 1 for name, value in zip(OPTIONAL.names, optional) if value is not None},
        )

    def _writer(self, name: str) -> ShardWriter:
        def closing() -> Callable[[ShardEntry], None]:
            position, refused, converted = self.position, self._refused, dict(self._converted)
            self._refused, self._converted = [], Counter()
            return lambda entry: self.journal.append(Step(name, entry, position, refused, converted))

        return ShardWriter(
            self.folder / name,
            shard_bytes=int(self.settings.shard_mb * 1e6),
            shard_samples=self.settings.shard_samples,
            prefix=self.prefix,
            first=0 if self.existing is None else self.existing.first_number(name),
            closing=closing,
        )

    def _replay(self, step: Step) -> None:
        """Restores the state of one journal step: a shard that an interrupted pack completed."""
        if step.split not in self.writers:
            self.writers[step.split] = self._writer(step.split)
        self.writers[step.split].entries.append(step.entry)
        path = index_path(self.journal.shards / step.split, step.entry.name)
        columns = ["key", "image_sha256", "persons", "captions", "label", *OPTIONAL.names]
        table = read_index(path, columns)
        refused = {number for number, _ in step.refused}
        numbers = [n for n in self.order_M[self.position : step.next].tolist() if n not in refused]
        assert len(numbers) == table.num_rows, f"{path}: the journal does not match"
        for number, key, sha256 in zip(numbers, table["key"].to_pylist(), table["image_sha256"].to_pylist()):
            self.packed.check(number, key, sha256)
        self._kept.update(numbers)
        self.result.packed[step.split] += table.num_rows
        persons = pc.list_value_length(table["persons"]).to_pylist()
        optional = zip(*(table[name].to_pylist() for name in OPTIONAL.names))
        for found in zip(table["captions"].to_pylist(), table["label"].to_pylist(), persons, optional):
            self._count(*found)
        self.result.rejected += [rejected for _, rejected in step.refused]
        self.result.converted.update(step.converted)
        self.position = step.next
