"""Source layouts: one small file each, with one generator of `Record`s. See README.md here.

A new layout is a module with `read(source, options) -> Iterator[Record]` and a line in `LAYOUTS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from shards.detect.types import Person
from uniemox_dist.core.errors import UserError


@dataclass(frozen=True)
class Slice:
    """A picture inside a larger file, such as a tar."""

    path: str
    """Local path or URL."""
    offset: int
    length: int


@dataclass(frozen=True)
class Cell:
    """A picture inside a column of a Parquet file."""

    path: str
    """Local path or URL."""
    column: str
    row_group: int
    row: int
    """Within the row group."""


Image = bytes | str | Slice | Cell
"""The encoded picture itself, the path or URL of its file, or its place inside a larger file."""


@dataclass(frozen=True)
class Record:
    """A picture as a source offers it, before anything was read or checked."""

    name: str
    """Unique within the source; becomes the key where it is a legal one."""
    image: Image
    captions: tuple[str, ...] = ()
    label: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    """JSON values."""
    split: str | None = None
    persons: tuple[Person, ...] | None = None
    """Boxes that the source brings; None if it brings none and a detector may look."""
    boxes_size: tuple[float, float] | None = None
    """Width and height in pixels of the picture that the boxes were drawn in, as the source states them, where that
    may be the picture as it is stored, before EXIF turns it. None: the boxes are fractions of the upright one."""
    group: str | None = None
    """Part of its label from which splits of our own take equal shares, such as UBE's search engines."""
    size: int | None = None
    """Bytes of the encoded picture, where they are known without reading it."""
    refused: tuple[str, str] | None = None
    """(reason, detail) of a picture that the layout itself cannot offer, such as one without its file: it is
    counted and listed with all that is refused."""


@dataclass(frozen=True)
class SourceOptions:
    """What a layout may need to know besides the path."""

    columns: dict[str, str] = field(default_factory=dict)
    """Renamed columns of a table: our name -> the table's."""
    source_persons: bool = False
    """Whether the user asked for the source's own person boxes (`--persons source`), however costly to read."""


Reader = Callable[[str, SourceOptions], Iterator[Record]]
LAYOUTS = {
    "coco": "shards.sources.coco",
    "emoset": "shards.sources.emoset",
    "emotic": "shards.sources.emotic",
    "folder": "shards.sources.folder",
    "table": "shards.sources.table",
    "wds": "shards.sources.wds",
}


def open_source(layout: str, source: str, options: SourceOptions) -> Iterator[Record]:
    """The records of a source, in an order that depends on its content alone.

    Raises:
        UserError: for an unknown layout or a source that is not of this layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout={layout}: not known; valid are {', '.join(sorted(LAYOUTS))}")
    read: Reader = import_module(LAYOUTS[layout]).read
    return read(source, options)
