"""What a source says of one picture, as values that a shard can hold: texts, captions, persons, JSON.

All functions raise an error of `BAD_VALUE` for what they cannot take; a layout refuses that record (`annotation`).
"""

import base64
import datetime
import errno
import json
import math
from collections.abc import Mapping
from typing import Any

from shards.detect.types import Person
from shards.pack.recordable import MAX_DEPTH
from shards.storage import Place

BAD_VALUE = (ValueError, KeyError, TypeError, OverflowError)
_NO_SUCH_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
)


def content(path: Place) -> bytes:
    """The bytes of a file that belongs to one picture.

    Raises ValueError where its name leads to no file that can be read (missing, a link to nowhere, a name that is
    too long); an OSError of the disk or network is none of that picture's and passes.
    """
    try:
        return bytes(path.read_bytes())
    except OSError as error:
        if isinstance(error, FileNotFoundError):  # object stores raise it without a number
            raise ValueError("no such file") from None
        if error.errno in _NO_SUCH_FILE:
            raise ValueError(f"cannot be read ({error.strerror})") from None
        raise


def load_json(data: bytes | str, **options: Any) -> Any:
    """The value that a JSON text spells; ValueError for one that is too deep for Python's reader, too."""
    try:
        return json.loads(data, **options)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def text(value: Any) -> str | None:
    """A single value as text; None for a missing one (null, NaN, an empty text)."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict | list | tuple | bytes):
        raise TypeError(f"holds {_kind(value)} where a text is expected")
    return str(value)


def captions(value: Any) -> tuple[str, ...]:
    """One caption or a list of them, without empty ones; numbers count as their text."""
    found = map(text, value if isinstance(value, list | tuple) else [value])
    return tuple(caption for caption in found if caption)


def persons(value: Any) -> tuple[Person, ...] | None:
    """A list of objects with `box`, `score` (1 where there is none) and `labels`, or the same as JSON text."""
    entries = load_json(value) if isinstance(value, str) and value else value
    if not entries:
        return None
    if not isinstance(entries, list):
        raise TypeError(f"holds {_kind(entries)} where a list of persons is expected")
    return tuple(map(_person, entries))


def _person(entry: Any) -> Person:
    if not isinstance(entry, Mapping):
        raise TypeError(f"holds {_kind(entry)} where a box, score and labels are expected")
    labels = entry.get("labels") or {}
    labels = load_json(labels) if isinstance(labels, str) else labels
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels: holds {_kind(labels)} where an object is expected")
    return Person.from_json({"box": entry["box"], "score": entry.get("score", 1.0), "labels": plain(labels)})


def attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them, without missing ones."""
    found = {str(name): plain(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value not in (None, "")}


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: times in ISO 8601, NaN as null, bytes in base64, and text for the rest."""
    if depth > MAX_DEPTH:
        raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return str(value)


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bytes: "bytes"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
