"""The file of near-copies that `shards overlap` writes: one row for each pair, and what was compared."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.format.parquet import THREADS, open_parquet
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path

FORMAT, FORMAT_VERSION = "uniemox-overlap", 1
META = b"uniemox"
_SIDE = [
    ("set", pa.string()),
    ("split", pa.string()),
    ("key", pa.string()),
    ("shard", pa.string()),
    ("row", pa.int32()),
]
SCHEMA = pa.schema(
    [
        *((f"kept_{name}", kind) for name, kind in _SIDE),
        *((f"copy_{name}", kind) for name, kind in _SIDE),
        ("kind", pa.string()),
        ("score", pa.float32()),
        ("residual", pa.float32()),
    ]
)
_FIX = "write it with `uniemox shards overlap … --out FILE`"


@dataclass(frozen=True)
class ComparedSet:
    """One data set that was compared."""

    name: str
    """The folder's name, that of its parent for a split."""
    split: str
    """"" for a data set without splits."""
    identity: str
    samples: int
    unreadable: int = 0

    @property
    def title(self) -> str:
        """Name and split."""
        return f"{self.name}/{self.split}" if self.split else self.name


@dataclass(frozen=True)
class Sample:
    """One side of a pair."""

    set: int
    """Index into the compared data sets."""
    key: str
    shard: str
    row: int


@dataclass(frozen=True)
class Pair:
    """Two near-copies. `kept` is the one that stays if one has to go: see `find.py`."""

    kept: Sample
    copy: Sample
    kind: str
    score: float
    residual: float


@dataclass(frozen=True)
class Overlap:
    """A file of near-copies."""

    sets: tuple[ComparedSet, ...]
    pairs: tuple[Pair, ...]

    def counts(self) -> dict[tuple[int, int], int]:
        """(set, other set) -> how many different samples of the set have a near-copy in the other one."""
        found: dict[tuple[int, int], set[str]] = {}
        for pair in self.pairs:
            for one, two in ((pair.kept, pair.copy), (pair.copy, pair.kept)):
                found.setdefault((one.set, two.set), set()).add(one.key)
        return {places: len(keys) for places, keys in sorted(found.items())}

    def describe(self) -> list[str]:
        """One line for each data set and for each pair of data sets with near-copies."""
        counts = self.counts()
        lines = []
        for number, one in enumerate(self.sets):
            inside = counts.get((number, number), 0)
            text = f"{one.title}: {one.samples} samples, {inside} of them near-copies of each other"
            lines.append(text + (f", {one.unreadable} could not be read" if one.unreadable else ""))
            lines += [
                f"  {count} have a near-copy in {self.sets[other].title}"
                for (first, other), count in counts.items()
                if first == number and other != number
            ]
        return lines


def write_pairs(path: Path, sets: Sequence[ComparedSet], pairs: Iterable[Pair]) -> None:
    """Writes a file of near-copies atomically. Sets are in the order of preference, pairs in that of their copies."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for pair in pairs:
        for prefix, side in (("kept", pair.kept), ("copy", pair.copy)):
            about = sets[side.set]
            values = (about.name, about.split, side.key, side.shard, side.row)
            for (name, _), value in zip(_SIDE, values):
                columns[f"{prefix}_{name}"].append(value)
        columns["kind"].append(pair.kind)
        columns["score"].append(round(pair.score, 4))
        columns["residual"].append(round(pair.residual, 2))
    stated = {"format": FORMAT, "format_version": FORMAT_VERSION, "sets": [asdict(one) for one in sets]}
    meta = {META: json.dumps(stated, ensure_ascii=False).encode("utf-8", "backslashreplace")}
    table = pa.Table.from_pydict(columns, schema=SCHEMA).replace_schema_metadata(meta)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_pairs(path: Path, field: str) -> Overlap:
    """Reads a file of near-copies; `field` is the option or argument that names it.

    Raises:
        UserError: if it is missing, damaged or another file.
    """
    with open_parquet(path, SCHEMA, what="file of near-copies", fix=_FIX) as file:
        meta = (file.schema_arrow.metadata or {}).get(META)
        table = file.read(columns=SCHEMA.names, use_threads=THREADS)
    try:
        stated = json.loads(meta or b"")
        if stated["format"] != FORMAT or stated["format_version"] > FORMAT_VERSION:
            raise ValueError
        sets = tuple(ComparedSet(**one) for one in stated["sets"])
        place = {(one.name, one.split): number for number, one in enumerate(sets)}
        pairs = tuple(_pair(row, place) for row in table.to_pylist())
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{field}={path}: is not a file of near-copies of this version; {_FIX}") from None
    return Overlap(sets, pairs)


def _pair(row: dict[str, Any], place: dict[tuple[str, str], int]) -> Pair:
    sides = [
        Sample(
            place[row[f"{p}_set"], row[f"{p}_split"]],
            str(row[f"{p}_key"]),
            str(row[f"{p}_shard"]),
            int(row[f"{p}_row"]),
        )
        for p in ("kept", "copy")
    ]
    return Pair(sides[0], sides[1], str(row["kind"]), float(row["score"]), float(row["residual"]))


def choose_dropped(overlap: Overlap, identity: str, field: str) -> dict[str, str]:
    """The samples of one data set that are dropped so that none of its near-copies remains: key -> why.

    A sample is dropped if the other one of a pair stays: it is in another data set and preferred, or it is in this one,
    preferred, and not dropped itself.

    Raises:
        UserError: if the data set with this identity was not compared.
    """
    mine = {number for number, one in enumerate(overlap.sets) if one.identity == identity}
    if not mine:
        known = ", ".join(one.title for one in overlap.sets[:6])
        raise UserError(
            f"{field}: DIR is none of the data sets that were compared ({known}); run `uniemox shards overlap` with DIR"
        )
    dropped: dict[str, str] = {}
    # Pairs are in the order of their copies, so a preferred sample is decided before the others.
    for pair in overlap.pairs:
        if pair.copy.set not in mine:
            continue
        if pair.copy.key in dropped or (pair.kept.set in mine and pair.kept.key in dropped):
            continue
        dropped[pair.copy.key] = f"{pair.kind}: {overlap.sets[pair.kept.set].title}, {pair.kept.key}"
    return dropped
