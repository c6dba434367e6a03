"""The pipeline source -> check -> persons -> writer, over any number of processes with the same bytes.

Everything is written into `OUT.partial` and renamed to `OUT` when it is whole. Whole shards stay there when a
pack is killed, with a journal of them, so that `resume` goes on behind the last one.
"""

import errno
import fcntl
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.captions import load_captioner
from shards.cells import CellReader
from shards.duplicates import Seen
from shards.encode import Encoded
from shards.index import index_path, read_index
from shards.journal import Journal, Step, has_steps
from shards.listing import Listing
from shards.manifest import Manifest, ShardEntry, manifest_folders, read_manifest
from shards.persons import make_detector
from shards.prepare import Batch, Preparation, Ready, Rejected
from shards.presets import find_preset
from shards.settings import PackSettings
from shards.sources import SourceOptions, open_source
from shards.workers import Task, Workers
from shards.writer import ShardWriter
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import atomic_path, publish_dir, write_json

CHUNK = 16  # records per task: amortises the hand-over, and fills a detector batch
WORK = ".work"
PART = "part.json"
REJECTED = pa.schema([("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class Progress(Protocol):
    """What a pack tells while it runs; tqdm's bars are such."""

    total: float | None

    def update(self, n: float = 1) -> Any:
        """`n` more records are done."""


@dataclass
class PackResult:
    """What a pack did. `records` = sum of `packed` + `rejected`, always."""

    folders: list[Path] = field(default_factory=list)
    records: int = 0
    packed: Counter[str] = field(default_factory=Counter)
    with_person: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    reused: bool = False
    resumed: int = 0
    """Records that an interrupted pack had done before."""


def pack(
    settings: PackSettings,
    out: Path,
    *,
    workers: int = 0,
    resume: bool = False,
    part: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Packs a source, or one part of it, into `out` (or `out/<split>` where there are splits).

    Raises:
        UserError: `out` exists, the source is not of its layout or holds nothing that can be packed, or there is
            no room to write.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _reuse(settings, part, out, resume)
    detector = make_detector(settings.persons)  # a wrong name or missing runtime ends here, not in a worker
    captioner = load_captioner(settings.captions)
    preset = find_preset(settings.preset)
    out = out.absolute()  # so that `.` has a name, too
    with _partial(out, resume) as partial, Workers(workers) as pool:
        work = partial / WORK
        options = SourceOptions(settings.columns, settings.persons == "source")
        records = open_source(settings.layout, preset.locate(settings.source), options)
        listing = Listing.of(
            records, work, seed=settings.seed, preset=preset, keep_labels=settings.keep_labels
        )
        provenance = {
            "settings": settings.to_json(),
            "captions": None if captioner is None else captioner.identity,
            "labels": list(preset.labels),
            "splits": {"made": preset.split or preset.divide, "seed": settings.seed}
            if listing.made_splits
            else None,
            "detector": detector.identity,
            "source_sha256": listing.digest,
        }
        preparation = Preparation(
            settings.persons, settings.check, settings.shrink, settings.filters, captioner, work
        )
        journal = Journal(work, {**provenance, "part": part})
        run = _Run(settings, partial, listing, part, journal, progress)
        run.go(preparation, pool)
        run.finish(provenance, part)
        if out.is_dir():
            out.rmdir()
        publish_dir(partial, out)
    shutil.rmtree(out / WORK, ignore_errors=True)
    run.result.folders = manifest_folders(out)
    return run.result


def _reuse(settings: PackSettings, part: tuple[int, int] | None, out: Path, resume: bool) -> PackResult:
    folders = manifest_folders(out) if out.is_dir() else []
    if not (resume and (folders or (out / PART).is_file())):
        raise UserError(
            f"OUT={out}: exists; give another folder, delete it, or use --resume to keep a complete pack"
        )
    result = PackResult(folders, reused=True)
    for folder in folders:
        manifest = read_manifest(folder, "OUT")
        stated = manifest.provenance
        if stated.get("settings") != settings.to_json() or (stated.get("part") or None) != (
            part and list(part)
        ):
            raise UserError(f"OUT={out}: was packed with other settings; give another folder or delete it")
        result.packed[folder.name if folder != out else ""] = manifest.samples
    result.records = sum(result.packed.values())
    shutil.rmtree(out / WORK, ignore_errors=True)
    return result


@contextmanager
def _partial(out: Path, resume: bool) -> Iterator[Path]:
    """The folder that becomes `out`: this process's alone, kept after an error if it holds whole shards."""
    partial = out.with_name(f"{out.name}.partial")
    work = partial / WORK
    if has_steps(work) and not resume:
        raise UserError(
            f"OUT={out}: an interrupted pack lies in {partial.name}; go on with --resume, or delete it"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115 (held until the end)
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror}); give another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"OUT={out}: another process is packing into {partial.name}; wait for it") from None
    try:
        if not has_steps(work):
            _clear(partial)
        yield partial
    except BaseException as error:
        whole = has_steps(work)
        if not whole:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            kept = f"the whole shards stay in {partial.name}: " if whole else "nothing was kept: "
            again = "the same command with --resume goes on" if whole else "start again"
            raise UserError(f"OUT={out}: {error.strerror}; {kept}make room, then {again}") from None
        raise
    finally:
        lock.close()


def _clear(partial: Path) -> None:
    for path in partial.iterdir():
        if path.name != WORK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Run:
    """One walk over the order of packing, from where the journal ends."""

    def __init__(
        self,
        settings: PackSettings,
        folder: Path,
        listing: Listing,
        part: tuple[int, int] | None,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self.settings, self.folder, self.listing = settings, folder, listing
        self.journal, self.progress = journal, progress
        self.prefix = "" if part is None else f"p{part[0]:03d}-"
        self.order_M, self.piece_M = listing.order(part)
        self.result = PackResult(records=len(self.order_M))
        self.writers: dict[str, ShardWriter] = {}
        self.seen = Seen(listing)
        self.position = 0
        """Records consumed, in the order of packing."""
        self._refused: list[tuple[int, Rejected]] = []  # since the last step

    def go(self, preparation: Preparation, workers: Workers) -> None:
        """Packs what is left."""
        for step in self.journal.steps(self.folder):
            self._replay(step)
        self._tidy()
        self.result.resumed = self.position
        if self.progress is not None:
            self.progress.total = len(self.order_M)
            self.progress.update(self.position)
        try:
            for task, batch in workers.prepare(self._tasks(), preparation):
                self._take(task, batch)
                if self.progress is not None:
                    self.progress.update(len(task.numbers))
            for writer in self.writers.values():
                writer.close()
        finally:
            for writer in self.writers.values():
                writer.settle()  # after an error, too: a shard that is full becomes whole

    def finish(self, provenance: dict[str, Any], part: tuple[int, int] | None) -> None:
        """Writes manifests and the list of what was refused."""
        result = self.result
        if not self.writers and part is None:
            first = result.rejected[0] if result.rejected else None
            because = f"; the first: {first.source}: {first.detail}" if first else ""
            raise UserError(
                f"SOURCE={self.settings.source}: nothing to pack, {len(result.rejected)} records refused{because}"
            )
        reasons = Counter(rejected.reason for rejected in result.rejected)
        provenance |= {"records": result.records, "rejected": dict(sorted(reasons.items()))}
        if part is not None:
            provenance["part"] = list(part)
            write_json(self.folder / PART, {**provenance, "packed": dict(result.packed)})
        write_rejected(self.folder, [asdict(rejected) for rejected in result.rejected])
        for name, writer in self.writers.items():
            Manifest(tuple(writer.entries), provenance).write(self.folder / name)
        self.listing.spool.close()

    def _tasks(self) -> Iterator[Task]:
        cells = CellReader()
        spool = self.listing.spool
        for start in range(self.position, len(self.order_M), CHUNK):
            numbers = self.order_M[start : start + CHUNK].tolist()
            lines = [spool.line(number) for number in numbers]
            images: list[bytes | str | None] = [None] * len(numbers)
            for i, piece in enumerate(self.piece_M[start : start + CHUNK].tolist()):
                if piece >= 0 and (cell := self.listing.cell(lines[i])) is not None:
                    images[i] = cells.read(cell, piece)
            yield Task(numbers, lines, images)

    def _take(self, task: Task, batch: Batch) -> None:
        data, offset = memoryview(batch.data), 0
        for number, item in zip(task.numbers, batch.items):
            if isinstance(item, Ready):
                encoded = Encoded(data[offset : offset + item.length], item.image_length, item.fields)
                offset += item.length
                refusal = self.seen.refusal(number, item.fields["key"], item.fields["image_sha256"])
                if refusal is None:
                    self._write(number, encoded)
                else:
                    item = Rejected(item.source, *refusal)
            if isinstance(item, Rejected):
                self.result.rejected.append(item)
                self._refused.append((number, item))
            self.position += 1

    def _write(self, number: int, sample: Encoded) -> None:
        name = self.listing.split(number)
        if name not in self.writers:
            for writer in self.writers.values():
                writer.close()  # records come split after split: one shard at a time is open
            self.writers[name] = self._writer(name)
        self.writers[name].append(sample)
        self.result.packed[name] += 1
        self.result.with_person += bool(sample.fields["persons"])

    def _writer(self, name: str) -> ShardWriter:
        def closing() -> Callable[[ShardEntry], None]:
            position, refused = self.position, self._refused
            self._refused = []
            return lambda entry: self.journal.append(Step(name, entry, position, refused))

        return ShardWriter(
            self.folder / name,
            shard_bytes=int(self.settings.shard_mb * 1e6),
            shard_samples=self.settings.shard_samples,
            prefix=self.prefix,
            closing=closing,
        )

    def _tidy(self) -> None:
        """Deletes what a killed pack left besides whole shards: temporary files, a tar that is not in the journal."""
        whole = {
            path
            for name, writer in self.writers.items()
            for entry in writer.entries
            for path in (self.folder / name / entry.name, index_path(self.folder / name, entry.name))
        }
        for path in self.folder.rglob("*"):
            if path.is_file() and WORK not in path.relative_to(self.folder).parts and path not in whole:
                path.unlink()

    def _replay(self, step: Step) -> None:
        """Takes over a shard that an interrupted pack left."""
        if step.split not in self.writers:
            self.writers[step.split] = self._writer(step.split)
        self.writers[step.split].entries.append(step.entry)
        path = index_path(self.folder / step.split, step.entry.name)
        table = read_index(path, ["key", "image_sha256", "persons"])
        refused = {number for number, _ in step.refused}
        numbers = [n for n in self.order_M[self.position : step.next].tolist() if n not in refused]
        assert len(numbers) == table.num_rows, f"{path}: the journal does not fit"
        for number, key, sha256 in zip(numbers, table["key"].to_pylist(), table["image_sha256"].to_pylist()):
            self.seen.refusal(number, key, sha256)
        self.result.packed[step.split] += table.num_rows
        self.result.with_person += pc.sum(pc.greater(pc.list_value_length(table["persons"]), 0)).as_py()
        self.result.rejected += [rejected for _, rejected in step.refused]
        self.position = step.next


def write_rejected(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rejected.parquet."""
    with atomic_path(folder / "rejected.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=REJECTED), temporary)
