"""Files of a teacher cache: one safetensors file per shard, written atomically, with metadata that identify it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import safe_open

from uniemox_dist.core.errors import Fault
from uniemox_dist.data.reader import ShardReader

T = TypeVar("T")
MAX_OPEN_FILES = 256
"""Cache files that one process keeps open. They are memory-mapped, so an open file costs little."""


def cache_file(reader: ShardReader, folder: Path, shard: int) -> Path:
    """Returns the path of a shard's file in a cache folder."""
    return folder / f"{reader.manifest.shards[shard].name.removesuffix('.tar')}.safetensors"


def read_metadata(path: Path) -> dict[str, str] | None:
    """Reads the metadata of a cache file; None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # safetensors has its own error type; the builder replaces a damaged file
        return None


class CacheFiles(Generic[T]):
    """The files of a finished cache, opened on first use. Cheap to pickle, because open files are left out."""

    def __init__(
        self, reader: ShardReader, folder: Path, load: Callable[[Any], T], *, what: str, fix: str
    ) -> None:
        """
        Args:
            load: returns the object to keep for an open safetensors file.
            what: name of the cache, for error messages.
            fix: advice to the user for a damaged file.
        """
        self._reader, self._folder = reader, folder
        self._load, self._what, self._fix = load, what, fix
        self._loaded: dict[int, T] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": {}}

    def path(self, shard: int) -> Path:
        """The path of a shard's file."""
        return cache_file(self._reader, self._folder, shard)

    def open(self, shard: int) -> T:
        """Returns what `load` returned for a shard's file.

        Raises:
            Fault: if the file cannot be read.
        """
        if shard not in self._loaded:
            try:
                loaded = self._load(safe_open(self.path(shard), "pt"))
            except Exception as error:  # safetensors has its own error type for a damaged file
                why = (str(error) or type(error).__name__).splitlines()[0]
                raise Fault(f"{self.path(shard)}: cannot read {self._what} ({why}); {self._fix}") from None
            if len(self._loaded) >= MAX_OPEN_FILES:
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[shard] = loaded
        return self._loaded[shard]
