"""The files of a cache beside a data set: one safetensors file per shard, whole or absent, told apart by metadata."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import safe_open

from uniemox_dist.core.errors import Fault
from uniemox_dist.data.reader import ShardReader

T = TypeVar("T")
OPEN_FILES = 256
"""Cache files that one process has open: mapped into memory, so that they cost little."""


def shard_file(reader: ShardReader, folder: Path, shard: int) -> Path:
    """The file of a shard in a cache's folder."""
    return folder / f"{reader.manifest.shards[shard].name.removesuffix('.tar')}.safetensors"


def metadata_of(path: Path) -> dict[str, str] | None:
    """The metadata of a file; None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # safetensors raises its own type for a damaged file; such a file is made again
        return None


class ShardFiles(Generic[T]):
    """The files of a finished cache, opened where they are used. Cheap to pickle."""

    def __init__(
        self, reader: ShardReader, folder: Path, opened: Callable[[Any], T], *, what: str, fix: str
    ) -> None:
        """`opened` makes of an open file what is kept of it; `what` and `fix` are for the line of an error."""
        self.paths = [shard_file(reader, folder, shard) for shard in range(len(reader.manifest.shards))]
        self._opened, self._what, self._fix = opened, what, fix
        self._kept: dict[int, T] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def of(self, shard: int) -> T:
        """The file of a shard.

        Raises:
            Fault: if it cannot be read.
        """
        if shard not in self._kept:
            try:
                found = self._opened(safe_open(self.paths[shard], "pt"))
            except Exception as error:  # safetensors raises its own type for a damaged file
                why = (str(error) or type(error).__name__).splitlines()[0]
                raise Fault(
                    f"{self.paths[shard]}: {self._what} cannot be read ({why}); {self._fix}"
                ) from None
            if len(self._kept) >= OPEN_FILES:
                self._kept.pop(next(iter(self._kept)))
            self._kept[shard] = found
        return self._kept[shard]
