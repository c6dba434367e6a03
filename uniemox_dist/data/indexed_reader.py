"""The part that readers of indexed tars share: finding rows, verified reads, checks of sizes, and pickling."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from shards.format.entries import ShardEntry
from shards.format.manifest import Manifest
from shards.storage import Place, file_sizes, is_local, parse_place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import hide_secrets
from uniemox_dist.core.formatting import cut
from uniemox_dist.data.index_rows import RowCache, RowSource
from uniemox_dist.data.origin import ShardOrigin

R = TypeVar("R")
T = TypeVar("T")
DIFFER = "bytes differ from the index"
"""How the line of such a damaged sample ends."""


class DamagedSample(ValueError):
    """A sample whose bytes do not match the hash in the index, or cannot be decoded."""


class IndexedReader(Generic[R]):
    """Random access to the samples of indexed tars by (shard, row). Cheap to pickle: each process opens files on first
    use. R is the type of the index's rows."""

    KEEP_ROWS = 1 << 16
    """Index rows kept in memory, about 300 bytes each. A process that reads many streams sets more."""

    rows: ClassVar[RowSource[Any]]
    """How a class of readers reads indexes."""

    def __init__(
        self,
        folder: str | Place,
        manifest: Manifest,
        *,
        field: str = "path",
        verify_hash: bool = True,
        index: str | Place | None = None,
    ) -> None:
        """`folder` has the tars, and `index` the folder index/; by default both are the same."""
        self.url = str(folder)
        self.manifest = manifest
        self.verify_hash = verify_hash
        self.origin = ShardOrigin(self.url, field)
        self.index_origin = self.origin if index is None else ShardOrigin(str(index), field)
        self.keep_rows = self.KEEP_ROWS
        self._rows: RowCache[R] | None = None

    @property
    def folder(self) -> Place:
        """Folder of the tars."""
        return self.origin.folder

    @property
    def counts(self) -> Sequence[int]:
        """Number of samples of each shard."""
        return self.manifest.counts

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(self.counts)

    @property
    def is_local(self) -> bool:
        """True if the tars are in the local file system."""
        return is_local(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def close(self) -> None:
        """Closes open files; the next read opens them again."""
        self.origin.close()

    def check_sizes(self, share: tuple[int, int], fix: str) -> None:
        """Checks that each tar exists with the size in the manifest, or those of the part `share` (rank, ranks).

        Raises:
            UserError: naming the first shard that is missing or has another size.
        """
        shards = self.manifest.shards[share[0] :: share[1]]
        folder, field = parse_place(self.url, self.origin.field), self.origin.field
        for shard, size in zip(shards, file_sizes(folder, [shard.name for shard in shards])):
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise UserError(f"{field}={hide_secrets(self.url)}: shard {shard.name} {state}; {fix}")

    def find(self, shard: int, row: int) -> tuple[ShardEntry, R]:
        """Returns a shard's entry, and one row of its index.

        Raises:
            UserError: if the index does not match the manifest.
            Fault: if it cannot be read.
        """
        rows = self._rows
        if rows is None:
            rows = self._rows = RowCache(self.rows, self.keep_rows)
        entry = self.manifest.shards[shard]
        found = self.origin.retry(
            f"the index of {entry.name}", lambda: rows.row(self.index_origin.folder, shard, entry, row)
        )
        return entry, found

    def read_intact(
        self, entry: ShardEntry, key: str, read: Callable[[bool], T], is_intact: Callable[[T], bool]
    ) -> T:
        """Returns the result of `read(cached)` if it is intact. Otherwise reads once more, from the origin.

        Raises:
            DamagedSample: if it is damaged there, too.
        """
        data = read(True)
        if is_intact(data):
            return data
        # The cached copy or the transfer may be damaged; the bytes at the origin decide.
        if self.origin.cache is not None:
            self.origin.cache.discard(entry)
        data = read(False)
        if is_intact(data):
            return data
        raise DamagedSample(f"{entry.name}: {cut(key)}: {DIFFER}")
