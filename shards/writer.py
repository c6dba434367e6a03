"""Samples into tar shards: fixed bytes, a new shard when one is full, each published only when whole."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

from shards.format import Sample
from shards.index import Location, index_path, index_row, rows_sha256, write_index
from shards.manifest import ShardEntry
from uniemox_dist.runtime.files import fsync_dir, sha256_file

BLOCK = 512


class ShardWriter:
    """Writes samples into `folder/000000.tar`, `000001.tar`, …, each with its index.

    A shard is written under a temporary name, fsynced, and renamed after its index: a tar that has its name
    is complete. None is larger than `shard_bytes` unless a single sample is. Tars hold no times, owners or
    extended headers, so that equal samples give equal bytes.
    """

    def __init__(self, folder: Path, *, shard_bytes: int, shard_samples: int, prefix: str = "") -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shard_samples = shard_samples
        self.prefix = prefix
        self.entries: list[ShardEntry] = []
        self._file: BinaryIO | None = None
        self._rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample) -> None:
        """Appends a sample, beginning a new shard when this one would grow beyond its size or count."""
        data = b"".join(_member(name, content) for name, content in sample.members())
        if self._file is not None and (
            _finished_bytes(self._file.tell() + len(data)) > self.shard_bytes
            or len(self._rows) >= self.shard_samples
        ):
            self._finish()
        if self._file is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by _finish)
        offset = self._file.tell()
        location = Location(offset, len(data), offset + BLOCK, len(sample.image))
        self._file.write(data)
        self._rows.append(index_row(sample, location))

    def close(self) -> list[ShardEntry]:
        """Finishes the last shard and returns all of them."""
        if self._file is not None:
            self._finish()
        return self.entries

    @property
    def _name(self) -> str:
        return f"{self.prefix}{len(self.entries):06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self._name}.tmp"

    def _finish(self) -> None:
        assert self._file is not None
        end = self._file.tell()
        self._file.write(bytes(_finished_bytes(end) - end))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = index_path(self.folder, self._name)
        write_index(index, self._rows)
        final = self.folder / self._name
        os.replace(self._temporary, final)
        fsync_dir(self.folder)
        self.entries.append(
            ShardEntry(
                name=final.name,
                samples=len(self._rows),
                bytes=final.stat().st_size,
                sha256=sha256_file(final),
                index_sha256=sha256_file(index),
                rows_sha256=rows_sha256(self._rows),
            )
        )
        self._file, self._rows = None, []


def _finished_bytes(end: int) -> int:
    """Size of a tar whose members end here: two zero blocks, and padding to whole records as tar does it."""
    end += 2 * BLOCK
    return end + -end % tarfile.RECORDSIZE


def _member(name: str, content: bytes) -> bytes:
    """Header, content and padding of one tar member, in the plain ustar form with fixed fields."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o644, 0
    buffer = io.BytesIO()
    buffer.write(info.tobuf(tarfile.USTAR_FORMAT))
    buffer.write(content)
    buffer.write(bytes(-len(content) % BLOCK))
    return buffer.getvalue()
