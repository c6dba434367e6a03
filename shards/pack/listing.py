"""What a source holds, before any picture is read: labels checked, splits settled, and the order of packing.

Shapes: N records of the source, M records of this part in the order of packing.
"""

import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.format.manifest import MANIFEST
from shards.format.sample import make_key
from shards.pack.recordable import recordable
from shards.pack.spool import Spool, parse
from shards.sources import Cell, Record
from shards.sources.presets import Labels, Preset, cut, draw64
from uniemox_dist.core.errors import UserError

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # file systems take 255 bytes
RESERVED = {MANIFEST, "sizes.json", "rejected.parquet", "part.json"}
"""Files of ours that lie where the folders of splits do."""
PIECE_BYTES = 96 << 20
"""Row groups of a table are fetched and shuffled together up to this size (one at least)."""
FIRST = {"test": 0, "val": 1, "train": 2}
"""Splits that are packed first, so that of a picture in several splits the test copy is met first and stays."""


class Listing:
    """The records of a source, spooled to disk, with what planning needs of them in arrays."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.spool = Spool(folder)
        self.seed = seed
        self.splits: list[str | None] = []
        self.labels: list[str | None] = []
        self.digest = ""
        """A hash of what was listed: an interrupted pack goes on only with the same."""
        self.made_splits = False
        """Whether the splits are ours, made from the preset's shares."""
        self._codes: dict[str, dict[Any, int]] = {name: {} for name in ("split", "label", "stratum", "block")}
        self._arrays = {name: array("q") for name in ("split", "label", "stratum", "block")}
        self._sizes = array("q")  # of the blocks
        self._draws = array("Q")
        self._keys = array("Q")
        self._refused = array("b")

    @classmethod
    def of(
        cls,
        records: Iterator[Record],
        folder: Path,
        *,
        seed: int,
        preset: Preset,
        keep_labels: tuple[str, ...],
    ) -> "Listing":
        """Lists a source. Labels get their declared spelling; records with another one, and those that cannot be
        written down, are marked as refused.

        Raises:
            UserError: for a split that is no folder name, and where only some records have one.
        """
        listing = cls(folder, seed)
        declared, kept = Labels(preset.labels), Labels(keep_labels)
        for record in records:
            listing._append(_with_label(recordable(record), declared, kept), preset.by_group)
        listing.splits, listing.labels = list(listing._codes["split"]), list(listing._codes["label"])
        listing._settle_splits(preset)
        listing.digest = listing.spool.seal()
        return listing

    def split(self, number: int) -> str:
        """The split of a record; "" where the source has none."""
        return self.splits[self.split_N[number]] or ""

    def label(self, number: int) -> str | None:
        """The label of a record."""
        return self.labels[self._arrays["label"][number]]

    @staticmethod
    def cell(line: bytes) -> Cell | None:
        """The place of a record's picture, where that is in a table."""
        image = parse(line).image
        return image if isinstance(image, Cell) else None

    def order(self, part: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
        """The M numbers of a part's records in the order of packing, and the piece that each is fetched with.

        Split after split, records in the order of their draws; those in row groups of a table by pieces, which are
        several row groups from all over it.
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
        """Hashes of keys that several records have: all others need not be remembered while packing."""
        keys_N = np.frombuffer(self._keys, np.uint64)
        values, counts = np.unique(keys_N, return_counts=True)
        return frozenset(values[counts > 1].tolist())

    def _append(self, record: Record, by_group: bool) -> None:
        split = record.split or None
        self._arrays["split"].append(self._code("split", split))
        self._arrays["label"].append(self._code("label", record.label))
        stratum = (record.label, record.group if by_group else None)
        self._arrays["stratum"].append(self._code("stratum", stratum))
        self._arrays["block"].append(self._block(record))
        self._draws.append(draw64(self.seed, f"{split}/{record.name}"))
        self._keys.append(key_hash(make_key(record.name)))
        self._refused.append(record.refused is not None)
        self.spool.append(record)

    def _code(self, kind: str, value: Any) -> int:
        return self._codes[kind].setdefault(value, len(self._codes[kind]))

    def _block(self, record: Record) -> int:
        if not isinstance(record.image, Cell):
            return -1
        code = self._code("block", (record.image.path, record.image.row_group))
        if code == len(self._sizes):
            self._sizes.append(0)
        self._sizes[code] += record.size or 0
        return code

    def _settle_splits(self, preset: Preset) -> None:
        split_N = np.frombuffer(self._arrays["split"], np.int64).copy()
        given_splits = list(self.splits)
        strata_N = np.frombuffer(self._arrays["stratum"], np.int64)
        draws_N = np.frombuffer(self._draws, np.uint64)
        if self.splits == [None] and preset.split:
            self.splits = list(preset.split)
            split_N = cut(strata_N, draws_N, preset.split)
        for given, shares in preset.divide.items():
            if given in self.splits and not (set(shares) - {given}) & set(self.splits):
                of_given = np.flatnonzero(split_N == self.splits.index(given))
                self.splits += [name for name in shares if name != given]
                codes = np.array([self.splits.index(name) for name in shares])
                split_N[of_given] = codes[cut(strata_N[of_given], draws_N[of_given], shares)]
        self.split_N = split_N
        self.made_splits = self.splits != given_splits
        self._check_splits()

    def _check_splits(self) -> None:
        """Of what may be packed: a refused record goes nowhere, whatever its split."""
        packed_N = np.frombuffer(self._refused, np.int8) == 0
        used = [self.splits[code] for code in np.unique(self.split_N[packed_N]).tolist()]
        for name in used:
            if name and not SPLIT_NAME.fullmatch(name):
                raise UserError(f"SOURCE: split={name!r}: not a folder name; use letters, digits, . _ -")
            if name in RESERVED:
                raise UserError(f"SOURCE: split={name!r}: a file of ours has this name; rename the split")
        if None in used and len(used) > 1:
            number = int(np.flatnonzero(packed_N & (self.split_N == self.splits.index(None)))[0])
            raise UserError(
                f"SOURCE: record {number} has no split where others have {_some(used)}; give every record "
                f"a split, or none"
            )

    def _piece_of_block(self) -> np.ndarray:
        """Blocks in the order of their draws, gathered into pieces; the piece's number for each block."""
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
    """Where a split stands in the order of packing."""
    return FIRST.get(name, len(FIRST)), name


def key_hash(key: str) -> int:
    """64 bits of a key."""
    return draw64(0, key)


def _with_label(record: Record, declared: Labels, kept: Labels) -> Record:
    label = declared.canonical(record.label)
    if record.refused is None and declared.declared and label is None:
        detail = f"label {record.label!r} is not one of {', '.join(declared.declared)}"
        return replace(record, refused=("label", detail))
    if record.refused is None and kept.declared and (label is None or kept.canonical(label) is None):
        return replace(record, label=label, refused=("label", f"label {label!r} is not asked for"))
    return record if label == record.label else replace(record, label=label)


def _some(splits: list[str | None]) -> str:
    return ", ".join(repr(name) for name in splits if name)[:80]
