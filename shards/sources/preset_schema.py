"""What a preset may state about a published set. presets.yaml has those that ship; `--preset FILE.yaml` reads one more.

A preset is facts: labels, where the pictures are, and which column of which table means what. `row_rules.py` applies
the facts about tables to their rows, `find_set.py` finds the files.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from shards.storage import Place
from uniemox_dist.config.sections import Section


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_regex(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text[:200]!r} is not a regular expression: {error}") from None
    return text


def _check_inside(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leads out of the set's folder; give a path below it")
    return path


def _check_label(text: str) -> str:
    if not text.strip() or not text.strip().isprintable():
        raise ValueError(f"{text!r} is no label; give a text on one line")
    return text.strip()


def _as_text(value: Any) -> Any:
    """YAML reads an unquoted 0 as a number."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _as_pairs(value: Any) -> Any:
    """[anger, fear] as {anger: anger, fear: fear}."""
    return {name: name for name in value} if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Paths = Annotated[tuple[Annotated[str, AfterValidator(_check_inside)], ...], BeforeValidator(_as_list)]
Text = Annotated[str, BeforeValidator(_as_text)]
Label = Annotated[Text, AfterValidator(_check_label)]
Regex = Annotated[str, AfterValidator(_check_regex)]
Ours = Literal["path", "key", "caption", "label", "split", "image"]
Dimension = Literal["valence", "arousal", "dominance"]
Range = tuple[float, float]
Shares = dict[str, Annotated[float, Field(gt=0)]]


class PersonColumns(Section):
    """Rows that describe persons. Several rows of one picture are its persons; `label` of `columns`, `dimensions` and
    `attributes` are then labels of the person."""

    box: Texts
    """The four columns of the box, or one column that holds a list of four numbers."""
    form: Literal["corners", "size"] = "corners"
    """corners: x1, y1, x2, y2. size: x, y, width, height."""
    unit: Literal["pixels", "fractions"] = "pixels"
    """Pixels of the stored picture, or fractions of the width and height of the upright one."""

    @model_validator(mode="after")
    def _has_a_box(self) -> "PersonColumns":
        if len(self.box) not in (1, 4):
            raise ValueError(
                f"persons.box: names {len(self.box)} columns; name four, or one that holds a list"
            )
        return self


class Pixels(Section):
    """A column of grey values that is the picture itself, such as FER2013's."""

    column: str
    size: tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]]
    """Width and height."""


class Table(Section):
    """A table of pictures, or of facts about pictures, and the meaning of its columns."""

    files: Paths = ()
    """Paths below the set's folder, in any case and with `*`. Alternatives: the first one that exists counts."""
    optional: bool = False
    """Whether the set may lack this table."""
    split: str | None = None
    """The split of all its pictures, for lists such as train.txt."""
    delimiter: str | None = None
    """One character, or `space` for any white space. None: by the extension and the header."""
    header: Texts = ()
    """The columns of a table without a header line."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Lines before the header, or before the first row of a table without one."""
    quotes: bool | None = None
    """Whether `"` encloses cells. False: it is a character like any other. None: False in tables with tabs and without
    a header line, otherwise True."""
    line: Regex | None = None
    """A regular expression with named groups, which are the columns; it replaces delimiter and quotes. Lines above the
    first one that it matches are a header; others that it does not match are refused."""
    records: str | None = None
    """The key of the list of objects in a `.json` file; None: the file is the list itself."""
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    columns: dict[Ours, str] = Field(default={})
    """Our names of columns -> the table's, or a template such as `{Folder}/{Filename}.jpg`. The column `file` is the
    name of the table without its extension. In JSON `sentences.raw` is the field `raw` of each item of `sentences`."""
    values: dict[Ours | Literal["labels"], dict[Text, Text]] = Field(default={})
    """Names for values of a column, such as {label: {0: anger}}."""
    patterns: dict[str, Regex] = Field(default={})
    """Column -> a regular expression that is searched in it, whose named groups become columns."""
    json_columns: Texts = ()
    """Columns that hold JSON or a list as Python prints it."""
    distribution: Annotated[dict[str, str], BeforeValidator(_as_pairs)] = Field(default={})
    """Label -> the column of its share, or a list of columns that are called like their labels."""
    votes: bool = False
    """Whether the shares are votes or percentages, which are divided by their sum."""
    label_votes: bool = False
    """Whether each row is one vote for its label: the distribution of a picture are the shares of its rows."""
    more: tuple[str, str] | None = None
    """Two columns; rows in which the first is not larger than the second are refused, such as [agree, disagree]."""
    dimensions: dict[Dimension, Texts] = Field(default={})
    """valence, arousal and dominance -> their column, or several of which the first one with a value counts."""
    missing: Texts = ()
    """Texts that stand for a missing number, besides NaN, NA and `-`."""
    persons: PersonColumns | None = None
    pixels: Pixels | None = None
    attributes: bool | Texts = True
    """Whether all other columns become attributes, or which columns do."""
    match: Literal["path", "name", "stem"] = "path"
    """How a row names its picture: by its path below the pictures, by its file name in any folder, or by that without
    its extension."""
    repeated: Literal["join", "first"] = "join"
    """How several rows of one picture are read. join: all of them describe it (captions, persons, votes). first: the
    first one counts, such as for pictures that were rated twice."""
    beside: Paths = ()
    """Another table whose rows are in the same order; its columns are added. Alternatives: the first that exists."""

    @model_validator(mode="after")
    def _is_complete(self) -> "Table":
        if self.delimiter is not None and self.delimiter != "space" and len(self.delimiter) != 1:
            raise ValueError(f"delimiter={self.delimiter!r}: give one character, or space")
        if self.line is not None and not re.compile(self.line).groupindex:
            raise ValueError(f"line={self.line!r}: has no named group; name one, such as (?P<path>.+)")
        for column, pattern in self.patterns.items():
            if not re.compile(pattern).groupindex:
                raise ValueError(
                    f"patterns.{column}={pattern!r}: has no named group, such as (?P<label>[a-z]+)"
                )
        return self


@dataclass(frozen=True)
class FoundTable:
    """A table of a set: its file, and what the preset states about it."""

    path: Place
    rules: Table
    beside: Place | None = None
    """The table whose columns are added row by row."""


class Form(Section):
    """One way in which a set is published."""

    layout: Literal["folder", "table", "coco", "emoset", "emotic", "wds"] = "folder"
    find: Paths = ()
    """Files or folders that identify the set's folder, in any case and with `*`; one of them is enough. Without it a
    set of tables is where one of them is, and a folder set where folders called like its labels are."""
    pictures: Paths = ()
    """The folder of the pictures below the set's folder. Alternatives: the first one that exists counts."""
    tables: tuple[Table, ...] = ()
    name: Regex | None = None
    """A regular expression that is searched in the path of a picture below `pictures`; its named groups may be label,
    split and group."""
    label_folders: bool = True
    """Whether the folders of pictures are labels, if `name` is not given."""
    arrays: dict[Literal["label", Dimension], str] = Field(default={})
    """Our names -> `.npy` files that hold one value for each picture, relative to the picture's folder, with `{stem}`
    for its name without extension, such as `../annotations/{stem}_val.npy`."""
    ignore: Paths = ()
    """Folders below `pictures` that belong to the set, but hold none of its pictures, such as masks."""

    @model_validator(mode="after")
    def _fits_its_layout(self) -> "Form":
        if self.tables and self.layout not in ("folder", "table"):
            raise ValueError(f"tables: layout {self.layout} reads its own; leave them out")
        if self.name is not None:
            strange = set(re.compile(self.name).groupindex) - {"label", "split", "group"}
            if strange or not re.compile(self.name).groupindex:
                raise ValueError(f"name={self.name!r}: its named groups may be label, split and group")
        if self.arrays and self.layout != "folder":
            raise ValueError(f"arrays: layout {self.layout} has no folders; leave them out")
        for ours, path in self.arrays.items():
            if "{stem}" not in path:
                raise ValueError(f"arrays.{ours}={path!r}: lacks {{stem}}, the name of the picture")
        for table in self.tables:
            if not table.files:
                raise ValueError("tables: one states no files")
        return self


class Preset(Section):
    """A published set. presets.yaml documents the fields by example."""

    labels: tuple[Label, ...] = ()
    """The declared labels; a picture with another one is refused. Case is ignored."""
    distribution_labels: tuple[Label, ...] = ()
    """The declared labels of distributions, if they are others."""
    synonyms: dict[Text, Label] = Field(default={})
    """Other spellings of labels that occur in published copies -> the declared label. Case is ignored."""
    dimension_ranges: dict[str, Range] = Field(default={})
    """The scale of valence, arousal and dominance. A value beyond it refuses its picture."""
    split: Shares = Field(default={})
    """Shares of train, val and test, drawn per label, if the set has no splits."""
    divide: dict[str, Shares] = Field(default={})
    """A given split that is divided further, per label, if the set has none of the new splits."""
    by_group: bool = False
    """Whether each folder below a label is divided in the same shares."""
    forms: tuple[Form, ...] = (Form(),)
    """The ways in which the set is published. The first one that is found counts."""

    @model_validator(mode="after")
    def _labels_are_known(self) -> "Preset":
        for name, (low, high) in self.dimension_ranges.items():
            if name not in get_args(Dimension):
                raise ValueError(
                    f"dimension_ranges.{name}: no dimension; they are {', '.join(get_args(Dimension))}"
                )
            if not low < high:
                raise ValueError(f"dimension_ranges.{name}=[{low:g}, {high:g}]: give the lower end first")
        for field in ("labels", "distribution_labels"):
            _check_distinct(field, getattr(self, field))
        known = {label.casefold() for label in (*self.labels, *self.distribution_labels)}
        meant: dict[str, str] = {}
        for spelling, label in self.synonyms.items():
            if label.casefold() not in known:
                labels = f": {', '.join(self.labels)}" if self.labels else ", which are not given"
                raise ValueError(f"synonyms.{spelling}={label!r}: is none of labels{labels}")
            if spelling.casefold() in known and spelling.casefold() != label.casefold():
                raise ValueError(
                    f"synonyms.{spelling}={label!r}: is a label itself; leave it out of one of both"
                )
            if meant.setdefault(spelling.casefold(), label).casefold() != label.casefold():
                raise ValueError(
                    f"synonyms.{spelling}={label!r}: the spelling means {meant[spelling.casefold()]!r}, too"
                )
        return self


def _check_distinct(field: str, labels: tuple[str, ...]) -> None:
    first: dict[str, str] = {}
    for label in labels:
        if (other := first.setdefault(label.casefold(), label)) is not label:
            raise ValueError(
                f"{field}: {other!r} and {label!r} are the same, because case is ignored; keep one"
            )
