"""Sources: what a source layout yields, and access to the layouts by name. README.md explains how to add one.

Every module in `layouts/` is a layout. Its name is the value of `--layout`; it defines
`read(source, options) -> Iterator[Record]`, and may name in `USES` the options of `shards pack` that have an effect on
it: `--column`, `--picture`, `--allow-outside` if its files state paths of pictures, and `--persons source` if the
source has person boxes. `SEVERAL_ROWS = True` says that several of its records may describe one picture; the packer
then joins them. No other file lists the layouts.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

from shards.detect.types import Person
from shards.sources import layouts
from uniemox_dist.core.errors import UserError

if TYPE_CHECKING:
    from shards.sources.preset_schema import Form, FoundTable, Table


@dataclass(frozen=True)
class Slice:
    """A picture inside a larger file, such as a tar."""

    path: str
    """Local path or URL."""
    offset: int
    """Bytes."""
    length: int
    """Bytes."""


@dataclass(frozen=True)
class Cell:
    """A picture inside a column of a Parquet file."""

    path: str
    """Local path or URL."""
    column: str
    row_group: int
    row: int
    """Row within the row group."""
    otherwise: str = ""
    """Path or URL of the picture's file, which counts if the cell is empty."""


Image = bytes | str | Slice | Cell
"""The encoded picture itself, the path or URL of its file, or its place inside a larger file."""


@dataclass(frozen=True)
class Record:
    """A picture as a source describes it. Nothing has been read or checked yet."""

    name: str
    """Unique within the source. It becomes the sample's key if it is a legal key."""
    image: Image
    captions: tuple[str, ...] = ()
    label: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    """JSON values. `valence`, `arousal` and `dominance` are those of the picture, and numbers if they are to be
    trained."""
    split: str | None = None
    persons: tuple[Person, ...] | None = None
    """The source's person boxes; None if it has none, so that a detector may run."""
    boxes_size: tuple[float, float] | None = None
    """Width and height in pixels of the picture in which the boxes were drawn, if that may be the stored picture,
    before EXIF turns it. None: the boxes are fractions of the upright picture."""
    pixel_boxes: tuple[tuple[float, float, float, float], ...] | None = None
    """The boxes of `persons` in pixels of the stored picture, if the source does not state its size. The packer scales
    them; the boxes of `persons` themselves have no meaning then."""
    is_person: bool = False
    """True for a row that describes one person of its picture: joined rows are the persons of one record."""
    is_vote: bool = False
    """True for a row whose distribution is one vote: those of joined rows are averaged."""
    table: int = 0
    """The number of its table, if a preset states several. Rows of another table have other attributes."""
    group: str | None = None
    """A level below the label, such as UBE's search engines; splits take equal shares of every group."""
    size: int | None = None
    """Bytes of the encoded picture, if known without reading it."""
    refused: tuple[str, str] | None = None
    """(reason, detail) if the layout itself cannot provide the picture, for example because its file is missing. The
    packer counts and lists it with all other refused records."""
    distribution: dict[str, float] | None = None
    """Labels and their shares, which are finite, not negative and sum to 1 within 0.001; None if the source states
    none."""
    digest: str = ""
    """A hash of the picture in a `Cell`, if the layout has read it: records with equal ones are rows of one picture.
    Known only while a source is listed."""


@dataclass
class Findings:
    """Facts about a source besides its records, which a layout collects while it is read."""

    not_pictures: Counter[str] = field(default_factory=Counter)
    """Files that are not pictures, by extension (`.xml`)."""
    notes: list[str] = field(default_factory=list)
    """Lines for the summary of a pack."""
    captions: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=Counter)
    """Files by the columns of their captions, and by columns with such names that are attributes."""
    cells: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Cells of CSVs by column and by what was found in them, for notes."""
    roots: set[str] = field(default_factory=set)
    """Local folders of tables. A picture named below one of them must really be there: links may not lead outside."""

    dimension_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest value of valence, arousal and dominance, if the layout knows them. They must be set before the
    first record is yielded. Those of a preset and of `--dimension-range` go before them."""


@dataclass(frozen=True)
class SourceOptions:
    """User settings that a layout may need besides the path."""

    columns: dict[str, str] = field(default_factory=dict)
    """Renamed columns of a table: our name -> the table's name."""
    source_persons: bool = False
    """True if the user asked for the source's own person boxes (`--persons source`), which may be slow to read."""
    allow_outside: bool = False
    """True if paths in the source's files may lead out of the source (`--allow-outside`)."""
    findings: Findings = field(default_factory=Findings)
    """Filled by the layout."""
    picture: str | None = None
    """Which picture of a sample with several (`--picture`), in lower case."""
    scratch: Path | None = None
    """A folder for temporary files, such as decompressed tars; None: sources that need one are refused."""
    pictures: str | None = None
    """The folder below which a table's paths are (`--pictures`, or the preset's); None: the table's own folder."""
    tables: "tuple[FoundTable, ...]" = ()
    """The tables of a published set and the meaning of their columns, from its preset."""
    form: "Form | None" = None
    """The published form of the set, from its preset."""
    table: "Table | None" = None
    """The delimiter and the header that the user gave (`--delimiter`, `--columns`)."""


Reader = Callable[[str, SourceOptions], Iterator[Record]]


def layout_names() -> list[str]:
    """The valid values of `--layout`, sorted. Imports no layout."""
    return sorted(name for _, name, _ in iter_modules(layouts.__path__) if not name.startswith("_"))


def open_source(layout: str, source: str, options: SourceOptions) -> Iterator[Record]:
    """The records of a source, in an order that depends only on its content.

    Raises:
        UserError: for an unknown layout or a source that does not have this layout.
    """
    read: Reader = _load(layout).read
    return read(source, options)


def check_options(layout: str, options: SourceOptions) -> None:
    """Checks that the options have an effect on a layout.

    Raises:
        UserError: for an option without effect, or an unknown layout.
    """
    uses = getattr(_load(layout), "USES", ())
    if options.columns and "--column" not in uses:
        first = next(iter(options.columns.items()))
        with_columns = [name for name in layout_names() if "--column" in getattr(_load(name), "USES", ())]
        raise UserError(
            f"--column={'='.join(first)}: --layout {layout} has no columns; leave it out, or give --layout "
            f"{' or '.join(with_columns)}"
        )
    if options.allow_outside and "--allow-outside" not in uses:
        raise UserError(f"--allow-outside: --layout {layout} reads no paths from its files; leave it out")
    for option, value in (("--pictures", options.pictures), ("--columns", options.table)):
        if value is not None and layout != "table":
            raise UserError(
                f"{option}: --layout {layout} reads no tables; leave it out, or give --layout table"
            )
    if options.picture is not None and "--picture" not in uses:
        raise UserError(
            f"--picture={options.picture}: --layout {layout} has one picture for each sample; leave it out, or give "
            "--layout wds"
        )
    if options.source_persons and "--persons source" not in uses:
        raise UserError(
            f"--persons=source: --layout {layout} has no person boxes; give nanodet, onnx:FILE or none"
        )


def may_repeat_pictures(layout: str) -> bool:
    """Whether several records of a layout may describe one picture."""
    return bool(getattr(_load(layout), "SEVERAL_ROWS", False))


def _load(layout: str) -> ModuleType:
    if layout not in layout_names():
        raise UserError(f"--layout={layout}: not known; valid are {', '.join(layout_names())}")
    return import_module(f"{layouts.__name__}.{layout}")
