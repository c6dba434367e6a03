"""The pipeline source -> check -> persons -> writer, over any number of processes with the same bytes.

Everything is written into `OUT.partial` and renamed to `OUT` when it is whole, so that a pack that was
killed leaves no data set that looks complete.
"""

import errno
import multiprocessing
import re
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.format import Sample, make_key
from shards.manifest import Manifest, manifest_folders, read_manifest
from shards.persons import PersonDetector, make_detector
from shards.pictures import BadPicture, decode
from shards.sources import Record, SourceOptions, open_source
from shards.writer import ShardWriter
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import atomic_path, publish_dir, sha256_bytes

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
CHUNK = 16  # records per task: amortises the hand-over, and fills a detector batch
REJECTED = pa.schema([("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of a pack; stands in the manifest's provenance."""

    source: str
    layout: str
    persons: str = "nanodet"
    shard_mb: float = 256.0
    shard_samples: int = 10_000
    seed: int = 0
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """A record that was refused, and why."""

    source: str
    reason: str
    detail: str


@dataclass
class PackResult:
    """What a pack did. `records` = sum of `packed` + `rejected`, always."""

    folders: list[Path]
    records: int = 0
    packed: Counter[str] = field(default_factory=Counter)
    with_person: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    reused: bool = False


def pack(
    settings: PackSettings, out: Path, *, workers: int = 0, resume: bool = False, progress: Any = None
) -> PackResult:
    """Packs a source into `out` (or `out/<split>` where the source names splits).

    `progress` is called with the number of records done, as they are done.

    Raises:
        UserError: `out` exists, or the source is not of its layout, or holds nothing that can be packed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _reuse(settings, out, resume)
    detector = make_detector(settings.persons)  # a wrong name or missing runtime ends here, not in a worker
    source = open_source(settings.layout, settings.source, SourceOptions(settings.seed, settings.columns))
    out = out.absolute()  # so that `.` has a name, too
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror}); give another folder") from None
    try:
        result = _write_all(
            settings, partial, _prepared(source, settings.persons, workers), progress, detector
        )
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.is_dir():
        out.rmdir()
    publish_dir(partial, out)
    result.folders = manifest_folders(out)
    return result


def _reuse(settings: PackSettings, out: Path, resume: bool) -> PackResult:
    folders = manifest_folders(out) if out.is_dir() else []
    if not (resume and folders):
        raise UserError(
            f"OUT={out}: exists; give another folder, delete it, or use --resume to keep a complete pack"
        )
    result = PackResult(folders, reused=True)
    for folder in folders:
        manifest = read_manifest(folder, "OUT")
        if manifest.provenance.get("settings") != asdict(settings):
            raise UserError(f"OUT={out}: was packed with other settings; give another folder or delete it")
        result.packed[folder.name if folder != out else ""] = manifest.samples
    result.records = sum(result.packed.values())
    return result


def _write_all(
    settings: PackSettings,
    partial: Path,
    prepared: Iterable[tuple[str | None, Sample | Rejected]],
    progress: Any,
    detector: PersonDetector,
) -> PackResult:
    result = PackResult([])
    writers: dict[str, ShardWriter] = {}
    keys: set[str] = set()
    for split, item in prepared:
        result.records += 1
        name = split or ""
        if isinstance(item, Sample) and item.key in keys:
            item = Rejected(item.source, "duplicate_key", f"another record has the key {item.key}")
        if isinstance(item, Rejected):
            result.rejected.append(item)
        else:
            if name not in writers:
                if name and not SPLIT_NAME.fullmatch(name):
                    raise UserError(
                        f"split={name!r} of {item.source}: not a folder name; use letters, digits, . _ -"
                    )
                if writers and bool(name) != ("" not in writers):
                    raise UserError(
                        f"SOURCE={settings.source}: {item.source} has split {split!r} where others have "
                        f"{next(iter(writers)) or None!r}; give every record a split, or none"
                    )
                writers[name] = ShardWriter(
                    partial / name,
                    shard_bytes=int(settings.shard_mb * 1e6),
                    shard_samples=settings.shard_samples,
                )
            keys.add(item.key)
            writers[name].add(item)
            result.packed[name] += 1
            result.with_person += bool(item.persons)
        if progress is not None:
            progress(1)
    if not writers:
        first = (
            f"; the first: {result.rejected[0].source}: {result.rejected[0].detail}"
            if result.rejected
            else ""
        )
        raise UserError(
            f"SOURCE={settings.source}: nothing to pack, {len(result.rejected)} records refused{first}"
        )
    reasons = Counter(r.reason for r in result.rejected)
    provenance = {
        "settings": asdict(settings),
        "detector": detector.identity,
        "records": result.records,
        "rejected": dict(sorted(reasons.items())),
    }
    with atomic_path(partial / "rejected.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(r) for r in result.rejected], schema=REJECTED), temporary)
    for name, writer in writers.items():
        Manifest(tuple(writer.close()), provenance).write(partial / name)
    return result


def _prepared(
    records: Iterator[Record], persons: str, workers: int
) -> Iterator[tuple[str | None, Sample | Rejected]]:
    """Prepares records in order; a bounded number of chunks is under way at any time."""
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    if workers == 0:
        _start_worker(persons)
        for chunk in chunks:
            yield from zip((r.split for r in chunk), _prepare(chunk))
        return
    # Fresh processes: a forked onnxruntime or pyarrow may hold locks of threads that do not exist any more.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(persons,))
    try:
        under_way: deque[tuple[list[str | None], Future[list[Sample | Rejected]]]] = deque()
        for chunk in chunks:
            under_way.append(([r.split for r in chunk], pool.submit(_prepare, chunk)))
            if len(under_way) > 4 * workers:
                splits, future = under_way.popleft()
                yield from zip(splits, future.result())
        while under_way:
            splits, future = under_way.popleft()
            yield from zip(splits, future.result())
    except BrokenProcessPool:
        raise RuntimeError(
            "a packing worker died (killed, or out of memory); start again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_detector: PersonDetector | None = None


def _start_worker(persons: str) -> None:
    global _detector
    _detector = make_detector(persons, threads=1)


def _prepare(records: list[Record]) -> list[Sample | Rejected]:
    """Reads, decodes and looks for persons; runs in a worker."""
    assert _detector is not None
    checked = [_check(record) for record in records]
    look = [item for item in checked if isinstance(item, _Checked) and item.record.persons is None]
    found = dict(zip(map(id, look), _detector.detect([item.rgb_HW3 for item in look])))
    return [
        item
        if isinstance(item, Rejected)
        else item.finish(tuple(found.get(id(item), item.record.persons or ())))
        for item in checked
    ]


class _Checked:
    """A record whose picture was decoded, waiting for its persons."""

    def __init__(self, record: Record, data: bytes) -> None:
        decoded = decode(data)
        self.record, self.data = record, data
        self.rgb_HW3, self.extension = decoded.rgb_HW3, decoded.extension

    def finish(self, persons: tuple[Any, ...]) -> Sample:
        height, width = self.rgb_HW3.shape[:2]
        return Sample(
            key=make_key(self.record.name),
            image=self.data,
            extension=self.extension,
            width=width,
            height=height,
            source=self.record.name,
            captions=self.record.captions,
            label=self.record.label,
            attributes=self.record.attributes,
            persons=persons,
            image_sha256=sha256_bytes(self.data),
        )


def _check(record: Record) -> "_Checked | Rejected":
    try:
        data = record.image if isinstance(record.image, bytes) else _read(record.image)
        return _Checked(record, data)
    except BadPicture as bad:
        return Rejected(record.name, bad.reason, bad.detail)


# What is wrong with a name, for good. Other errors (a disk, a network) end the pack: the data would change.
_NO_SUCH_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        if error.errno not in _NO_SUCH_FILE:
            raise
        raise BadPicture("unreadable", f"{error.strerror}: {path[:200]}") from None
    except ValueError:  # a zero byte inside the name
        raise BadPicture("unreadable", f"not a file name: {path[:200]!r}") from None
