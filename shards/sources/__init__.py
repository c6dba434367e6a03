"""Source layouts: one small file each, with one generator of `Record`s.

A new layout is a module with `read(source, options) -> Iterator[Record]` and a line in `LAYOUTS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from shards.persons import Person
from uniemox_dist.runtime.errors import UserError


@dataclass(frozen=True)
class Record:
    """A picture as a source offers it, before anything was checked."""

    name: str
    """Unique within the source; becomes the key where it is a legal one."""
    image: bytes | str
    """Encoded picture, or the path of its file."""
    captions: tuple[str, ...] = ()
    label: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    persons: tuple[Person, ...] | None = None
    """Boxes that the source brings; None if it brings none and a detector may look."""


@dataclass(frozen=True)
class SourceOptions:
    """What a layout may need to know besides the path."""

    seed: int = 0
    """Order in which records come: label folders in their own order would give label-sorted streams."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renamed columns of a table: our name -> the table's."""


Reader = Callable[[str, SourceOptions], Iterator[Record]]
LAYOUTS = {"table": "shards.sources.table", "folder": "shards.sources.folder"}


def open_source(layout: str, source: str, options: SourceOptions) -> Iterator[Record]:
    """The records of a source.

    Raises:
        UserError: for an unknown layout or a source that is not of this layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout={layout}: not known; valid are {', '.join(sorted(LAYOUTS))}")
    read: Reader = import_module(LAYOUTS[layout]).read
    return read(source, options)
