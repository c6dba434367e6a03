"""Lists the records of a source before any picture is read: checks labels, assigns splits, and orders the packing.

Shapes: N records of the source, M records of this part in the order of packing.
"""

import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.format.manifest import MANIFEST, SIZES
from shards.format.rejected import REJECTED
from shards.format.sample import make_key
from shards.pack.contents import Contents
from shards.pack.labels import DeclaredLabels, check_labels
from shards.pack.spool import Spool, parse_record
from shards.sources import Cell, Record
from shards.sources.presets import Preset, assign_shares, draw64
from shards.sources.rows import join_rows
from shards.sources.validate import validate_record
from uniemox_dist.core.errors import UserError

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # file systems take 255 bytes
RESERVED = {MANIFEST, SIZES, REJECTED, "part.json"}
"""Names of our own files beside the folders of splits."""
PIECE_BYTES = 96 << 20
"""Row groups of a table are read and shuffled together up to this size (at least one)."""
FIRST = {"test": 0, "val": 1, "train": 2}
"""Splits that are packed first, so that the test copy of a picture in several splits is found first and kept."""


class Listing:
    """The records of a source: spooled to disk, and the fields that planning needs in arrays."""

    def __init__(self, folder: Path, seed: int, name: str = "records.jsonl") -> None:
        self.spool = Spool(folder, name)
        self.seed = seed
        self.rows = 0
        """Rows of the source; more than its records if several rows describe one picture."""
        self.splits: list[str | None] = []
        self.labels: list[str | None] = []
        self.digest = ""
        """A hash of the listed records; an interrupted pack resumes only with the same one."""
        self.made_splits = False
        """True if the splits were drawn by us, from the preset's shares."""
        self.drawn: list[str] = []
        """How they were drawn, such as `drawn: train 70, val 10, test 20`."""
        self.used_splits: list[str] = []
        """The splits of records that may be packed; "" if the source has none."""
        self.unknown_labels: str | None = None
        """A line about labels that are not declared."""
        self.contents = Contents()
        """What the records that may be packed have."""
        self._codes: dict[str, dict[Any, int]] = {name: {} for name in ("split", "label", "stratum", "block")}
        self._arrays = {name: array("q") for name in ("split", "label", "stratum", "block")}
        self._sizes = array("q")  # of the blocks
        self._draws = array("Q")
        self._keys = array("Q")
        self._refused = array("b")
        self._places = array("Q")  # hashes of picture and split; 0 for records that are not joined
        self._digests = array("Q")  # of pictures in tables, by which these are compared; 0 for others

    @classmethod
    def read(
        cls,
        records: Iterator[Record],
        folder: Path,
        *,
        seed: int,
        preset: Preset,
        keep_labels: tuple[str, ...],
        ranges: Mapping[str, tuple[float, float]] | None = None,
        several_rows: bool = False,
    ) -> "Listing":
        """Lists a source. Labels get their declared spelling. Records with an undeclared label, and those that cannot
        be written, are marked as refused.

        Args:
            ranges: lowest and highest value of valence, arousal and dominance; records with others are refused.
            several_rows: records with the same picture (path, or bytes in a table) and split are rows of one record;
                they are joined. Bytes are compared by 128 bits of their hashes.

        Raises:
            UserError: for a split that is not a folder name, if only some records have a split, and if no record has a
                declared label.
        """
        listing = cls(folder, seed)
        ranges = {} if ranges is None else ranges  # an empty mapping may be filled while records are read
        labels = DeclaredLabels.of(preset, keep_labels, ranges)
        has_persons = False
        for record in records:
            if several_rows:
                listing._places.append(_place_hash(record))
                listing._digests.append(int(record.digest[-16:] or "0", 16))
                has_persons = has_persons or record.is_person
            listing._append(check_labels(validate_record(record), labels), preset.by_group)
        rows = len(listing.spool)
        if several_rows and (joined := listing._join_rows(always=has_persons)) is not None:
            unjoined, listing = listing, cls(folder, seed, "joined.jsonl")
            labels = DeclaredLabels.of(preset, keep_labels, ranges)
            for record in joined:
                listing._append(check_labels(validate_record(record), labels), preset.by_group)
            unjoined.spool.close()
            unjoined.spool.path.unlink()
        labels.check()
        listing.unknown_labels = labels.describe_unknown()
        listing.rows = rows
        listing.splits, listing.labels = list(listing._codes["split"]), list(listing._codes["label"])
        listing._assign_splits(preset)
        listing.digest = listing.spool.seal()
        return listing

    def split(self, number: int) -> str:
        """The split of a record; "" if the source has none."""
        return self.splits[self.split_N[number]] or ""

    def label(self, number: int) -> str | None:
        """The label of a record."""
        return self.labels[self._arrays["label"][number]]

    def describe(self) -> str:
        """What the records that may be packed have, in one line."""
        return self.contents.describe(sum(map(bool, self.used_splits)), self.drawn)

    @staticmethod
    def cell(line: bytes) -> Cell | None:
        """The place of a record's picture if that is in a table."""
        image = parse_record(line).image
        return image if isinstance(image, Cell) else None

    def order(self, part: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of a part's M records in the order of packing, and the piece with which each is read.

        Splits are packed one after the other, each in the order of its records' draws. Records in row groups of a table
        are grouped into pieces: several row groups from all over the table.
        """
        ranks = sorted(range(len(self.splits)), key=lambda code: split_rank(self.splits[code] or ""))
        rank_of = np.empty(len(ranks), np.int64)
        rank_of[ranks] = np.arange(len(ranks))
        block_N = np.frombuffer(self._arrays["block"], np.int64)
        piece_N = self._piece_of_block()[block_N] if len(self._sizes) else np.full(len(block_N), -1)
        draws_N = np.frombuffer(self._draws, np.uint64)
        order_N = np.lexsort((draws_N, piece_N, rank_of[self.split_N]))
        if part is not None:
            number, parts = part
            order_N = order_N[len(order_N) * (number - 1) // parts : len(order_N) * number // parts]
        return order_N, piece_N[order_N]

    def shared_keys(self) -> frozenset[int]:
        """Hashes of keys that several records share; only these keys need to be remembered while packing."""
        keys_N = np.frombuffer(self._keys, np.uint64)
        values, counts = np.unique(keys_N, return_counts=True)
        return frozenset(values[counts > 1].tolist())

    def find(self, names: frozenset[str]) -> frozenset[int]:
        """The numbers of the records with these names."""
        wanted_N = np.array([key_hash(make_key(name)) for name in names], np.uint64)
        candidates = np.flatnonzero(np.isin(np.frombuffer(self._keys, np.uint64), wanted_N)).tolist()
        return frozenset(n for n in candidates if parse_record(self.spool.line(n)).name in names)

    def _append(self, record: Record, by_group: bool) -> None:
        self.contents.add(record)
        split = record.split or None
        self._arrays["split"].append(self._code("split", split))
        self._arrays["label"].append(self._code("label", record.label))
        stratum = (record.label, record.group if by_group else None)
        self._arrays["stratum"].append(self._code("stratum", stratum))
        self._arrays["block"].append(self._block_of(record))
        self._draws.append(draw64(self.seed, f"{split}/{record.name}"))
        self._keys.append(key_hash(make_key(record.name)))
        self._refused.append(record.refused is not None)
        self.spool.append(record)

    def _join_rows(self, *, always: bool) -> Iterator[Record] | None:
        """The records with rows of one picture joined, each where its first row is; None if all pictures differ, unless
        `always`.

        Needs 48 bytes of memory per row; the rows themselves are read from the spool.
        """
        place_N = np.frombuffer(self._places, np.uint64)
        order_N = np.argsort(place_N, kind="stable")
        sorted_N = place_N[order_N]
        differs_N = np.ones(len(sorted_N), bool)
        differs_N[1:] = (sorted_N[1:] != sorted_N[:-1]) | (sorted_N[1:] == 0)
        starts = np.flatnonzero(differs_N)
        if len(starts) == len(place_N) and not always:
            return None
        self.spool.seal()
        end_N = np.zeros(len(place_N), np.int64)  # by the number of the first row; 0 for all other rows
        end_N[order_N[starts]] = np.append(starts[1:], len(place_N))
        start_N = np.zeros(len(place_N), np.int64)
        start_N[order_N[starts]] = starts
        return self._read_joined(order_N, start_N, end_N)

    def _read_joined(self, order_N: np.ndarray, start_N: np.ndarray, end_N: np.ndarray) -> Iterator[Record]:
        for number in np.flatnonzero(end_N):
            pictures: dict[Any, list[Record]] = {}  # more than one only if two hashes are equal by chance
            for row in order_N[start_N[number] : end_N[number]].tolist():
                record = parse_record(self.spool.line(row))
                if record.refused is not None and record.refused[0] == "label":
                    record = replace(record, refused=None)  # the label is checked again after joining
                image = self._digests[row] or record.image
                place = (image, record.split) if record.refused is None else row
                pictures.setdefault(place, []).append(record)
            yield from map(join_rows, pictures.values())

    def _code(self, kind: str, value: Any) -> int:
        return self._codes[kind].setdefault(value, len(self._codes[kind]))

    def _block_of(self, record: Record) -> int:
        if not isinstance(record.image, Cell):
            return -1
        code = self._code("block", (record.image.path, record.image.row_group))
        if code == len(self._sizes):
            self._sizes.append(0)
        self._sizes[code] += record.size or 0
        return code

    def _assign_splits(self, preset: Preset) -> None:
        split_N = np.frombuffer(self._arrays["split"], np.int64).copy()
        given_splits = list(self.splits)
        strata_N = np.frombuffer(self._arrays["stratum"], np.int64)
        draws_N = np.frombuffer(self._draws, np.uint64)
        if self.splits == [None] and preset.split:
            self.splits = list(preset.split)
            split_N = assign_shares(strata_N, draws_N, preset.split)
            self.drawn.append(f"drawn: {_list_shares(preset.split)}")
        for given, shares in preset.divide.items():
            if given in self.splits and not (set(shares) - {given}) & set(self.splits):
                of_given = np.flatnonzero(split_N == self.splits.index(given))
                self.splits += [name for name in shares if name != given]
                codes = np.array([self.splits.index(name) for name in shares])
                split_N[of_given] = codes[assign_shares(strata_N[of_given], draws_N[of_given], shares)]
                self.drawn.append(f"drawn from {given}: {_list_shares(shares)}")
        self.split_N = split_N
        self.made_splits = self.splits != given_splits
        self._check_splits()

    def _check_splits(self) -> None:
        """Checks the splits of records that may be packed; those of refused records do not matter."""
        packed_N = np.frombuffer(self._refused, np.int8) == 0
        used = [self.splits[code] for code in np.unique(self.split_N[packed_N]).tolist()]
        self.used_splits = [name or "" for name in used]
        for name in used:
            if name and not SPLIT_NAME.fullmatch(name):
                raise UserError(f"SOURCE: split={name!r}: not a folder name; use only letters, digits, . _ -")
            if name in RESERVED:
                raise UserError(
                    f"SOURCE: split={name!r}: reserved for a file of the data set; rename the split"
                )
        if None in used and len(used) > 1:
            number = int(np.flatnonzero(packed_N & (self.split_N == self.splits.index(None)))[0])
            raise UserError(
                f"SOURCE: record {number} has no split, but others have {_some(used)}; give every record "
                f"a split, or no record"
            )

    def _piece_of_block(self) -> np.ndarray:
        """Gathers blocks (row groups), in the order of their draws, into pieces; returns the piece of each block."""
        sizes = np.frombuffer(self._sizes, np.int64)
        order = sorted(range(len(sizes)), key=lambda block: draw64(self.seed, f"block {block}"))
        pieces = np.empty(len(sizes), np.int64)
        piece, filled = 0, 0
        for block in order:
            if filled and filled + sizes[block] > PIECE_BYTES:
                piece, filled = piece + 1, 0
            pieces[block] = piece
            filled += sizes[block]
        return pieces


def split_rank(name: str) -> tuple[int, str]:
    """The sort key of a split in the order of packing."""
    return FIRST.get(name, len(FIRST)), name


def key_hash(key: str) -> int:
    """A 64-bit hash of a key."""
    return draw64(0, key)


def _place_hash(record: Record) -> int:
    is_row = (isinstance(record.image, str) or record.digest) and record.refused is None
    return draw64(0, f"{record.split}\n{record.digest or repr(record.image)}") if is_row else 0


def _some(splits: list[str | None]) -> str:
    return ", ".join(repr(name) for name in splits if name)[:80]


def _list_shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:g}" for name, share in shares.items())
