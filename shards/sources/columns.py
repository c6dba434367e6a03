"""Which columns of a table, or fields of a JSON object, describe a picture, and the record that they make."""

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

from shards.sources import Image, Record
from shards.sources.files import split_name
from shards.sources.values import BAD_VALUE, parse_attributes, parse_captions, parse_persons, parse_text
from uniemox_dist.core.errors import UserError

KNOWN = ("image", "path", "key", "caption", "label", "split", "persons")
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
}
"""Usual names of columns in lower case, in order of preference."""
_SHAPES = {"image": ("", "object"), "caption": ("", "list"), "persons": ("", "list")}
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
        if theirs not in seen:
            some = ", ".join(sorted(seen)[:20]) or "none"
            raise UserError(f"--column {ours}={theirs}: {where} has such a field; the fields are {some}")


def exact_names(columns: Mapping[str, str]) -> dict[str, str]:
    """Our names -> the columns of that very name, or those that the user named."""
    return {name: columns.get(name, name) for name in KNOWN}


def usual_names(shapes: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, str]:
    """Our names -> the columns that the user named, or else the first one with a usual name, in any case.

    Args:
        shapes: the columns, and what each holds: `list`, `object` or "" for single values.
        columns: the columns that the user named, ours -> theirs.
    """
    return _usual_names(tuple(shapes.items()), tuple(columns.items()))


def shape_of(value: Any) -> str:
    """`list`, `object` or "" for all other values."""
    return "list" if isinstance(value, list | tuple) else "object" if isinstance(value, dict) else ""


@lru_cache(maxsize=128)
def _usual_names(shapes: tuple[tuple[str, str], ...], columns: tuple[tuple[str, str], ...]) -> dict[str, str]:
    given, shape = dict(columns), dict(shapes)
    by_name = {name.lower(): name for name in reversed(shape) if name not in given.values()}
    names: dict[str, str] = {}
    for ours in KNOWN:
        usual = _USUAL[ours] if ours != "path" or names["image"] not in shape else ("path",)
        found = (by_name[name] for name in usual if name in by_name)
        fits = (name for name in found if name.lower() == ours or shape[name] in _SHAPES.get(ours, ("",)))
        names[ours] = given.get(ours) or next(fits, ours)
    return names


def make_record(
    values: dict[str, Any], names: Mapping[str, str], name: str, image: Image, size: int | None = None
) -> Record:
    """The record of a row; `names` are from `exact_names` or `usual_names`, all or some of them, and all other values
    become attributes.

    A row with a value that cannot be converted becomes a refused record.
    """
    known = {ours: values.pop(theirs, None) for ours, theirs in names.items()}
    column = ""
    try:
        for ours, read in _READERS.items():
            column = f"the column {names.get(ours, ours)!r}: "
            known[ours] = read(known.get(ours))
        column = ""
        more = parse_attributes(values)
    except BAD_VALUE as error:
        split, key = (t if isinstance(t := known.get(ours), str) else None for ours in ("split", "key"))
        return Record(key or name, image, split=split, refused=("annotation", f"{column}{error}"))
    return Record(
        name=known["key"] or name,
        image=image,
        captions=known["caption"],
        label=known["label"],
        attributes=more,
        split=known["split"],
        persons=known["persons"],
        size=size,
    )


def _parse_split(value: Any) -> str | None:
    text = parse_text(value)
    return None if text is None else split_name(text)


# The split comes first, so that a refused record keeps it.
_READERS: dict[str, Callable[[Any], Any]] = {
    "split": _parse_split,
    "key": parse_text,
    "caption": parse_captions,
    "label": parse_text,
    "persons": parse_persons,
}
