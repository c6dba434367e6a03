"""Which columns of a table, or fields of a JSON object, describe a picture, and the record that they make.

`distribution` is a column of JSON objects (or structs) of labels and their shares, or several columns of numbers:
`--column distribution=anger,fear:p_fear` takes the share of anger from the column `anger`, and that of fear from
`p_fear`. `votes` is the same for counts, votes and percentages, which are divided by their sum. `valence`, `arousal`
and `dominance` are attributes that must be numbers.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from shards.format.sample import DIMENSIONS
from shards.sources import Image, Record, SourceOptions
from shards.sources.files import split_name
from shards.sources.values import (
    BAD_VALUE,
    divide_votes,
    parse_attributes,
    parse_captions,
    parse_dimension,
    parse_distribution,
    parse_label,
    parse_persons,
    parse_text,
)
from uniemox_dist.core.errors import UserError

USUAL = ("image", "path", "key", "caption", "label", "split", "persons", "distribution")
"""Our names of columns that are found by name."""
NAMED = ("votes", *DIMENSIONS)
"""Those that only the user names; a column `valence` that no `--column` names is an attribute as any other."""
DESCRIBING = ("caption", "label", "split", "persons", "distribution", *NAMED)
"""Those that describe a picture which is known already."""
READ = (*DESCRIBING, "captions")
"""Those under which a record's values are read: with a second column of captions."""
KNOWN = (*USUAL, *NAMED)
"""Our names of columns, the valid left sides of `--column`."""
DOWNLOAD = frozenset(("key", "status", "error_message", "sha256", "md5", "width", "height"))
"""Fields in which img2dataset describes its download; they do not describe the picture."""
_USUAL = {
    "image": ("image", "img", "picture"),
    "path": (
        *("path", "file_name", "filename", "filepath", "file_path", "file", "image_path", "img_path"),
        *("image_name", "image_file", "url", "image_url"),
    ),
    "key": ("key",),
    "caption": ("caption", "captions", "text", "sentence", "sentences", "comment"),
    "label": ("label", "labels", "class", "class_name", "category", "emotion"),
    "split": ("split",),
    "persons": ("persons",),
    "distribution": ("label_distribution", "distribution"),
}
"""Usual names of columns in lower case, in order of preference. `caption` and `captions` are kept both."""
_CAPTIONS = ("caption", "captions")
_SHAPES = {
    "image": ("", "object"),
    "caption": ("", "list"),
    "persons": ("", "list"),
    "distribution": ("", "object"),
}
"""What columns with a usual name may hold; single values if not stated."""


def check_known(columns: Mapping[str, str]) -> None:
    """Raises UserError for a `--column` whose left side is not one of our names."""
    for unknown in sorted(set(columns) - set(KNOWN)):
        raise UserError(f"--column {unknown}=…: unknown column; valid are {', '.join(KNOWN)}")


def check_columns_seen(columns: Mapping[str, str], seen: Collection[str], where: str) -> None:
    """Checks that each column that the user named occurred, once a source without a header has been read.

    Raises:
        UserError: for one that did not; `where` begins with "no", such as "no line".
    """
    for ours, theirs in columns.items():
        if missing := missing_columns(ours, theirs, seen):
            some = ", ".join(sorted(seen)[:20]) or "none"
            what = "such a field" if missing == [theirs] else f"the field {missing[0]!r}"
            raise UserError(f"--column {ours}={theirs}: {where} has {what}; the fields are {some}")


def share_columns(ours: str, theirs: str, present: Collection[str]) -> dict[str, str]:
    """The labels and columns of `distribution=anger,fear:p_fear`; empty if `theirs` is one column."""
    if ours not in ("distribution", "votes") or theirs in present or not ("," in theirs or ":" in theirs):
        return {}
    parts = [part.strip() for part in theirs.split(",")]
    pairs = [
        (part, part) if part in present else (part.partition(":")[0], part.partition(":")[2] or part)
        for part in parts
    ]
    return dict(pairs)


def missing_columns(ours: str, theirs: str, present: Collection[str]) -> list[str]:
    """The columns that the user named and that are not there."""
    wanted = share_columns(ours, theirs, present)
    return [name for name in wanted.values() or [theirs] if name not in present]


def exact_names(columns: Mapping[str, str]) -> dict[str, str]:
    """Our names -> the columns of that very name, or those that the user named."""
    return {**{name: name for name in USUAL}, **columns}


def usual_names(shapes: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, str]:
    """Our names -> the columns that the user named, or else the first one with a usual name, in any case.

    Args:
        shapes: the columns, and what each holds: `list`, `object` or "" for single values.
        columns: the columns that the user named, ours -> theirs.
    """
    return _usual_names(tuple(shapes.items()), tuple(columns.items()))


def label_columns(present: Iterable[str]) -> list[str]:
    """The columns that are called like labels, in order of preference."""
    by_name = {name.lower(): name for name in present}
    return [by_name[name] for name in _USUAL["label"] if name in by_name]


def caption_names(shapes: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, str]:
    """Those of `usual_names` that are captions: `caption`, and `captions` if there are two columns."""
    return {ours: theirs for ours, theirs in usual_names(shapes, columns).items() if ours in _CAPTIONS}


class CaptionColumns:
    """Which columns of a file without a header are its captions, after all of its rows were added."""

    def __init__(self) -> None:
        self._shapes: dict[str, str] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Adds a row."""
        for name, value in values.items():
            if name.lower() in _USUAL["caption"]:
                shapes = shape_of(value), self._shapes.get(name, "")
                self._shapes[name] = max(shapes, key=("", "list", "object").index)

    def choose(self, options: SourceOptions) -> dict[str, str]:
        """The columns of captions by our names, which replace those of `usual_names` in every row. Notes the others."""
        names = caption_names(self._shapes, options.columns)
        note_captions(names, self._shapes, options)
        return names


def note_captions(names: Mapping[str, str], present: Iterable[str], options: SourceOptions) -> None:
    """Counts a file by the columns of its captions, and those that are called like captions but are attributes."""
    if "caption" in options.columns:
        return
    usual = [name for name in present if name.lower() in _USUAL["caption"]]
    used = {names[ours] for ours in _CAPTIONS if ours in names}
    if usual:
        chosen = tuple(sorted(name for name in usual if name in used))
        options.findings.captions[chosen, tuple(sorted(set(usual) - used))] += 1


def write_caption_notes(what: str, options: SourceOptions) -> None:
    """Notes where captions come from, if the files (`what`, in the plural) differ in it or have other such columns."""
    found = options.findings.captions
    kinds = {tuple(name.lower().removesuffix("s") for name in chosen[:1]) for chosen, _ in found}
    if len(kinds) < 2 and not any(others for _, others in found):
        return
    advice = "--column caption=NAME chooses"
    if options.table is not None:
        advice = "call the right one caption in --columns"
    elif options.tables:
        advice = "`columns: {caption: NAME}` in a preset chooses"
    for (chosen, others), count in sorted(found.items()):
        columns = " and ".join(map(repr, chosen))
        note = (
            f"{count} {what} with captions in {columns}"
            if chosen
            else f"{count} {what} without a caption column"
        )
        if others:
            note += f"; {', '.join(map(repr, others))} became attributes ({advice})"
        options.findings.notes.append(note)


def shape_of(value: Any) -> str:
    """`list`, `object` or "" for all other values."""
    return "list" if isinstance(value, list | tuple) else "object" if isinstance(value, dict) else ""


@lru_cache(maxsize=128)
def _usual_names(shapes: tuple[tuple[str, str], ...], columns: tuple[tuple[str, str], ...]) -> dict[str, str]:
    given, shape = dict(columns), dict(shapes)
    by_name = {name.lower(): name for name in reversed(shape) if name not in given.values()}
    names: dict[str, str] = {}
    for ours in USUAL:
        usual = _USUAL[ours] if ours != "path" or names["image"] not in shape else ("path",)
        found = (by_name[name] for name in usual if name in by_name)
        fits = (name for name in found if name.lower() == ours or shape[name] in _SHAPES.get(ours, ("",)))
        names[ours] = given.get(ours) or next(fits, ours)
    more = by_name.get("captions", "")
    if "caption" not in given and names["caption"].lower() == "caption" and names["caption"] in shape:
        names |= {"captions": more} if more and shape[more] in _SHAPES["caption"] else {}
    return names | {ours: given[ours] for ours in NAMED if ours in given}


def make_record(
    values: dict[str, Any],
    names: Mapping[str, str],
    name: str,
    image: Image,
    size: int | None = None,
    digest: str = "",
) -> Record:
    """The record of a row; `names` are from `exact_names` or `usual_names`, all or some of them, and all other values
    become attributes.

    A row with a value that cannot be converted becomes a refused record.
    """
    known = {ours: take_value(values, ours, theirs) for ours, theirs in names.items()}
    column = ""
    try:
        for ours, read in _READERS.items():
            column = f"the column {names.get(ours, ours)!r}: "
            known[ours] = read(known.get(ours))
        column = ""
        more = parse_attributes(values)
        more |= {ours: known[ours] for ours in DIMENSIONS if known[ours] is not None}
    except BAD_VALUE as error:
        split, key = (t if isinstance(t := known.get(ours), str) else None for ours in ("split", "key"))
        return Record(key or name, image, split=split, refused=("annotation", f"{column}{error}"))
    return Record(
        name=known["key"] or name,
        image=image,
        captions=tuple(dict.fromkeys(known["captions"] + known["caption"])),
        label=known["label"],
        distribution=known["distribution"] or known["votes"],
        attributes=more,
        split=known["split"],
        persons=known["persons"],
        size=size,
        digest=digest,
    )


def take_value(values: dict[str, Any], ours: str, theirs: str) -> Any:
    """Removes the column that the user named, or those with shares, from the values of a row; returns the value."""
    if not (shares := share_columns(ours, theirs, values)):
        return values.pop(theirs, None)
    return {label: values.pop(column, None) for label, column in shares.items()}


def _parse_split(value: Any) -> str | None:
    text = parse_text(value)
    return None if text is None else split_name(text)


# The split comes first, so that a refused record keeps it.
_READERS: dict[str, Callable[[Any], Any]] = {
    "split": _parse_split,
    "key": parse_text,
    "captions": parse_captions,
    "caption": parse_captions,
    "label": parse_label,
    "persons": parse_persons,
    "distribution": parse_distribution,
    "votes": lambda value: divide_votes(parse_distribution(value)),
    **dict.fromkeys(DIMENSIONS, parse_dimension),
}
