"""Writes samples into tar shards. Equal samples produce equal bytes; a shard gets its name only when it is
complete."""

import hashlib
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from shards.format.encode import BLOCK, Encoded, encode
from shards.format.entries import ShardEntry
from shards.format.index import index_path, rows_sha256, write_index
from shards.format.sample import Sample
from uniemox_dist.core.files import fsync_dir, sha256_file


class ShardWriter:
    """Writes samples into `folder/000000.tar`, `000001.tar`, …, each with its index; `first` is the first number.

    A shard is written under a temporary name, fsynced, and renamed after its index has been written. It is never larger
    than `shard_bytes`, unless a single sample is. Tars contain no times, owners or extended headers. A thread waits for
    the disk while the next shard is written. `closing` is called when a shard is full; it returns a function that is
    called when that shard is complete.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard_bytes: int,
        shard_samples: int,
        prefix: str = "",
        first: int = 0,
        closing: Callable[[], Callable[[ShardEntry], Any]] | None = None,
    ) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shard_samples = shard_samples
        self.prefix, self.first = prefix, first
        self.entries: list[ShardEntry] = []
        """Complete shards; a resumed pack continues after the existing ones."""
        self.closing = closing
        self._file: BinaryIO | None = None
        self._end = 0
        self._digest = hashlib.sha256()
        self._rows: list[dict[str, Any]] = []
        self._thread = ThreadPoolExecutor(1)
        self._publishing: Future[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample) -> None:
        """Appends a sample; starts a new shard if this one would exceed its size or count."""
        self.add_encoded(encode(sample))

    def add_encoded(self, sample: Encoded) -> None:
        """Like `add`, for an encoded sample."""
        length = len(sample.data)
        if self._file is not None and (
            _finished_bytes(self._end + length) > self.shard_bytes or len(self._rows) >= self.shard_samples
        ):
            self._finish()
        if self._file is None:
            self.wait()
            self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 (closed by _publish)
            self._end, self._digest = 0, hashlib.sha256()
        positions = {
            "sample_offset": self._end,
            "sample_length": length,
            "image_offset": self._end + BLOCK,
            "image_length": sample.image_length,
        }
        self._write(sample.data)
        self._rows.append({"key": sample.fields["key"], **positions, **sample.fields})

    def close(self) -> list[ShardEntry]:
        """Finishes the last shard and returns all of them."""
        if self._file is not None:
            self._finish()
        self.wait()
        return self.entries

    def wait(self) -> None:
        """Waits until every full shard is complete.

        Raises:
            OSError: if one could not be written.
        """
        if self._publishing is not None:
            pending, self._publishing = self._publishing, None
            pending.result()

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self.prefix}{self.first + len(self.entries):06d}.tar.tmp"

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._digest.update(data)
        self._end += len(data)
        rest = memoryview(data)
        while rest:  # an unbuffered write may be partial
            rest = rest[self._file.write(rest) :]

    def _finish(self) -> None:
        assert self._file is not None
        self._write(bytes(_finished_bytes(self._end) - self._end))
        done = self.closing() if self.closing is not None else lambda _: None
        full = (self._file, self._rows, self._end, self._digest.hexdigest(), done)
        self._file, self._rows = None, []
        self._publishing = self._thread.submit(self._publish, *full)

    def _publish(
        self,
        file: BinaryIO,
        rows: list[dict[str, Any]],
        size: int,
        sha256: str,
        done: Callable[[ShardEntry], Any],
    ) -> None:
        with file:
            os.fsync(file.fileno())
        temporary = Path(file.name)
        final = temporary.with_name(temporary.name[1:].removesuffix(".tmp"))
        index = index_path(self.folder, final.name)
        write_index(index, rows)
        os.replace(temporary, final)
        fsync_dir(self.folder)
        entry = ShardEntry(
            name=final.name,
            samples=len(rows),
            bytes=size,
            sha256=sha256,
            index_sha256=sha256_file(index),
            rows_sha256=rows_sha256(rows),
        )
        self.entries.append(entry)
        done(entry)


def _finished_bytes(end: int) -> int:
    """Size of a tar whose members end at `end`: plus two zero blocks, padded to whole records as tar does."""
    end += 2 * BLOCK
    return end + -end % tarfile.RECORDSIZE
