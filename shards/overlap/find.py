"""`uniemox shards overlap`: finds near-copies within and across data sets.

1. Every picture gets a fingerprint, shard after shard. Pictures with equal bytes are one from here on.
2. `candidates.py` finds pairs with similar fingerprints.
3. The pixels of each pair are compared.

Samples are numbered in the order of preference: test, val and train splits before others, then data sets as given, then
the order of their samples. In a pair the sample with the lower number is the one that is kept.

Shapes: N samples, R rows of fingerprints.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from shards.format.entries import ShardEntry
from shards.format.index import check_tar, read_shard_rows
from shards.format.manifest import Manifest, find_manifest_folders, read_manifest
from shards.overlap.candidates import FingerprintRows, find_candidates
from shards.overlap.compare import NearCopy, Prepared, compare, prepare
from shards.overlap.fingerprint import DECODED_SIDE, WIDTH, take_fingerprint
from shards.overlap.pairs import ComparedSet, Pair, Sample
from shards.pack.listing import FIRST, split_rank
from shards.pictures.decode import check_picture
from shards.pictures.formats import BadPicture
from shards.pool import Progress, map_in_order
from shards.storage import Place, open_seekable, read_range
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import convert_read_errors

PAIRS_PER_TASK = 128
REMEMBERED = 256
"""Decoded pictures that a worker keeps; candidates are sorted, so many follow soon."""
COLUMNS = ["key", "image_offset", "image_length", "image_sha256"]


@dataclass(frozen=True)
class OpenedSet:
    """A data set to compare."""

    folder: Place
    manifest: Manifest
    about: ComparedSet


@dataclass(frozen=True)
class _ShardPrints:
    """Fingerprints of one shard, sample after sample."""

    sha256_N16: np.ndarray
    offset_N: np.ndarray
    length_N: np.ndarray
    wholes_N: np.ndarray
    """Number of frames that are not windows; 0 if the picture shows nothing."""
    frames_N: np.ndarray
    values_RW: np.ndarray
    keys: list[str]
    unreadable: list[str]


@dataclass(frozen=True)
class Found:
    """The result of a comparison."""

    sets: list[ComparedSet]
    pairs: list[Pair]
    unreadable: list[str]
    """Pictures that could not be decoded, `data set: key: reason`."""
    candidates: int


def open_sets(folders: Sequence[Place]) -> list[OpenedSet]:
    """The data sets at or directly below some folders, in the order of preference.

    Raises:
        UserError: if a folder has none, or occurs twice, or two data sets have the same name.
    """
    opened: list[OpenedSet] = []
    for folder in folders:
        found = find_manifest_folders(folder)
        for place in found:
            manifest = read_manifest(place, "DIR")
            is_split = str(place) != str(folder) or place.name in FIRST
            name = place.parent.name if is_split else place.name
            about = ComparedSet(
                name or "data", place.name if is_split else "", manifest.identity, manifest.samples
            )
            opened.append(OpenedSet(place, manifest, about))
        if not found:
            read_manifest(folder, "DIR")  # reports what is wrong
    for number, one in enumerate(opened):
        for other in opened[:number]:
            if one.about.identity == other.about.identity:
                raise UserError(
                    f"DIR={one.folder}: is the same data set as {other.folder}; give each data set once"
                )
            if one.about.title == other.about.title:
                raise UserError(
                    f"DIR={one.folder}: has the same name as {other.folder}; rename one of the folders"
                )
    return sorted(opened, key=lambda one: split_rank(one.about.split)[0])


def find_pairs(
    sets: Sequence[OpenedSet],
    *,
    workers: int = 0,
    scratch: Path | None = None,
    reading: Progress | None = None,
    comparing: Progress | None = None,
) -> Found:
    """Finds the near-copies of some data sets. The result does not depend on the number of workers.

    Args:
        scratch: the folder for fingerprints, about 450 bytes for each picture, which are deleted at the end.

    Raises:
        UserError: if a shard is missing or differs from the manifest.
        Fault: if a worker is killed.
    """
    _load.cache_clear()  # of an earlier search in this process; the files may be others by now
    for one in sets:
        for entry in one.manifest.shards:
            check_tar(one.folder, entry, "DIR")
    jobs = [(one.folder, entry) for one in sets for entry in one.manifest.shards]
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".overlap-", dir=scratch) as folder:
        table = _Table(sets, Path(folder))
        for prints in map_in_order(_fingerprint_shard, jobs, workers=workers, progress=reading):
            table.append(prints)
        twins = table.find_twins()
        candidates = find_candidates(table.rows(), table.count)
        tasks = [
            (table.pictures(candidates[start : start + PAIRS_PER_TASK]),)
            for start in range(0, len(candidates), PAIRS_PER_TASK)
        ]
        related: list[tuple[int, int, NearCopy]] = [
            (one, two, NearCopy("bytes", 1.0, 0.0)) for one, two in twins
        ]
        results = map_in_order(_compare_pairs, tasks, workers=workers, progress=comparing)
        compared = [copy for result in results for copy in result]
        for (one, two), copy in zip(candidates.tolist(), compared):
            if copy is not None:
                related += [(min(pair), max(pair), copy) for pair in table.with_twins(one, two)]
        related.sort(key=lambda row: (row[1], row[0]))
        pairs = [
            Pair(table.sample(one), table.sample(two), copy.kind, copy.score, copy.residual)
            for one, two, copy in related
        ]
    return Found(table.abouts(), pairs, table.unreadable, len(candidates))


class _Table:
    """All samples: where they are, and their fingerprints in files."""

    def __init__(self, sets: Sequence[OpenedSet], folder: Path) -> None:
        self.sets, self.folder = sets, folder
        self.shards = [(number, entry) for number, one in enumerate(sets) for entry in one.manifest.shards]
        self.starts = np.cumsum([0, *(entry.samples for _, entry in self.shards)])
        self.count = int(self.starts[-1])
        self.unreadable: list[str] = []
        self._unreadable_of = [0] * len(sets)
        self._names = ("sha256", "offset", "length", "wholes", "frames", "values", "keys", "key_ends")
        for name in self._names:
            (folder / name).touch()
        self._done = 0
        self._key_end = 0

    def append(self, prints: _ShardPrints) -> None:
        """Adds the next shard."""
        number, _ = self.shards[self._done]
        self._done += 1
        arrays = {
            "sha256": prints.sha256_N16,
            "offset": prints.offset_N,
            "length": prints.length_N,
            "wholes": prints.wholes_N,
            "frames": prints.frames_N,
            "values": prints.values_RW,
        }
        for name, values in arrays.items():
            self._write(name, values.tobytes())
        encoded = [key.encode("utf-8", "surrogateescape") for key in prints.keys]
        self._write("keys", b"".join(encoded))
        ends = self._key_end + np.cumsum([len(key) for key in encoded], dtype=np.int64)
        self._write("key_ends", ends.tobytes())
        self._key_end = int(ends[-1]) if len(ends) else self._key_end
        self._unreadable_of[number] += len(prints.unreadable)
        self.unreadable += [f"{self.sets[number].about.title}: {text}" for text in prints.unreadable]

    def _write(self, name: str, data: bytes) -> None:
        with open(self.folder / name, "ab") as file:
            file.write(data)

    def _load(self) -> None:
        def mapped(name: str, kind: type, *shape: int) -> np.ndarray:
            path = self.folder / name
            if not path.stat().st_size:
                return np.zeros((0, *shape), kind)
            return np.asarray(np.memmap(path, kind, "r")).reshape(-1, *shape)

        self.sha256_N16 = mapped("sha256", np.uint8, 16)
        self.offset_N, self.length_N = mapped("offset", np.int64), mapped("length", np.int64)
        self.wholes_N, self.frames_N = mapped("wholes", np.uint8), mapped("frames", np.uint8)
        self.values_RW = mapped("values", np.int8, WIDTH)
        self.key_ends_N = mapped("key_ends", np.int64)

    def find_twins(self) -> list[tuple[int, int]]:
        """Pairs of samples with equal bytes: the preferred one of each group with every other one."""
        self._load()
        codes_N = np.ascontiguousarray(self.sha256_N16).view("V16").ravel()
        _, first_U, of_N = np.unique(codes_N, return_index=True, return_inverse=True)
        self.first_N = first_U[of_N.ravel()] if self.count else np.zeros(0, np.int64)
        copies = np.flatnonzero(self.first_N != np.arange(self.count))
        self._twins: dict[int, list[int]] = {}
        for copy in copies.tolist():
            self._twins.setdefault(int(self.first_N[copy]), []).append(copy)
        return [(int(self.first_N[copy]), copy) for copy in copies.tolist()]

    def rows(self) -> FingerprintRows:
        """Fingerprints of all distinct pictures."""
        owner_R = np.repeat(np.arange(self.count, dtype=np.int32), self.frames_N)
        ends_N = np.cumsum(self.frames_N, dtype=np.int64)
        place_R = np.arange(len(owner_R)) - np.repeat(ends_N - self.frames_N, self.frames_N)
        is_whole_R = place_R < np.repeat(self.wholes_N, self.frames_N)
        is_first_N = self.first_N == np.arange(self.count)
        if is_first_N.all():
            return FingerprintRows(self.values_RW, owner_R, is_whole_R)
        chosen = np.flatnonzero(is_first_N[owner_R])
        return FingerprintRows(self.values_RW[chosen], owner_R[chosen], is_whole_R[chosen])

    def with_twins(self, one: int, two: int) -> Iterator[tuple[int, int]]:
        """A pair, and each of the two with all samples of the other's bytes."""
        yield one, two
        yield from ((one, twin) for twin in self._twins.get(two, []))
        yield from ((twin, two) for twin in self._twins.get(one, []))

    def pictures(self, pairs_P2: np.ndarray) -> list[tuple["_Picture", "_Picture"]]:
        """Where the pictures of some pairs are."""
        return [(self._picture(one), self._picture(two)) for one, two in pairs_P2.tolist()]

    def _picture(self, number: int) -> "_Picture":
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        of, entry = self.shards[shard]
        tar = self.sets[of].folder / entry.name
        return _Picture(tar, int(self.offset_N[number]), int(self.length_N[number]))

    def sample(self, number: int) -> Sample:
        """One side of a pair."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        of, entry = self.shards[shard]
        start = int(self.key_ends_N[number - 1]) if number else 0
        with open(self.folder / "keys", "rb") as file:
            file.seek(start)
            key = file.read(int(self.key_ends_N[number]) - start).decode("utf-8", "surrogateescape")
        return Sample(of, key, entry.name, number - int(self.starts[shard]))

    def abouts(self) -> list[ComparedSet]:
        """The compared data sets, with the number of unreadable pictures."""
        return [replace(one.about, unreadable=count) for one, count in zip(self.sets, self._unreadable_of)]


@dataclass(frozen=True)
class _Picture:
    tar: Place
    offset: int
    length: int


def _fingerprint_shard(folder: Place, entry: ShardEntry) -> _ShardPrints:
    table = read_shard_rows(folder, entry, COLUMNS)
    columns = {name: table[name].to_pylist() for name in COLUMNS}
    wholes, frames, values, unreadable = [], [], [], []
    with convert_read_errors(f"DIR={folder / entry.name}"), open_seekable(folder / entry.name) as file:
        for key, offset, length, _ in zip(*columns.values()):
            file.seek(offset)
            try:
                picture = check_picture(file.read(length), pixels_side=DECODED_SIDE)
                assert picture.rgb_HW3 is not None
                prints = take_fingerprint(picture.rgb_HW3)
                wholes.append(prints.wholes)
                frames.append(len(prints.frames) if prints.wholes else 0)
                values.append(prints.values_FW[: frames[-1]])
            except BadPicture as bad:
                unreadable.append(f"{key}: {bad.reason}: {bad.detail}")
                wholes.append(0)
                frames.append(0)
    hashes = b"".join(bytes.fromhex(text[:32]) for text in columns["image_sha256"])
    return _ShardPrints(
        np.frombuffer(hashes, np.uint8).reshape(-1, 16),
        np.array(columns["image_offset"], np.int64),
        np.array(columns["image_length"], np.int64),
        np.array(wholes, np.uint8),
        np.array(frames, np.uint8),
        np.concatenate(values) if values else np.zeros((0, WIDTH), np.int8),
        columns["key"],
        unreadable,
    )


def _compare_pairs(pairs: list[tuple[_Picture, _Picture]]) -> list[NearCopy | None]:
    return [compare(_load(first), _load(second)) for first, second in pairs]


@lru_cache(maxsize=REMEMBERED)
def _load(picture: _Picture) -> Prepared:
    with convert_read_errors(f"DIR={picture.tar}"):
        data = read_range(picture.tar, picture.offset, picture.length)
    return prepare(data)
