"""Checks that a record can be written into a shard and into the list of refused records."""

import math
from typing import Any

from shards.detect.types import Person
from shards.sources import Cell, Record, Slice

MAX_DEPTH = 64
"""Levels of lists and objects in attributes and labels; JSON readers fail at some hundreds."""
MAX_BITS = 10_000
"""Largest number of bits of a whole number; Python neither writes nor reads numbers of more than 4,300 digits."""
SUM_TOLERANCE = 1e-3
"""Largest distance of the sum of a distribution from 1."""
_DETAIL_CHARS = 300
"""Length of a detail; names inside of attributes may have any length."""


def validate_record(record: Record) -> Record:
    """The record itself if all of it can be written; otherwise a refused record with the parts that can.

    Layouts pass on the content of files, and JSON may contain halves of surrogate pairs, infinity and any depth.
    """
    try:
        _check(record)
        return record
    except _Unwritable as problem:
        refused = record.refused or ("annotation", str(problem)[:_DETAIL_CHARS])
    return Record(
        name=escape_text(str(record.name)),
        image=record.image if isinstance(record.image, Slice | Cell) else b"",
        label=record.label if _is_text(record.label) else None,
        split=record.split if _is_text(record.split) else None,
        refused=(escape_text(refused[0]), escape_text(refused[1])),
    )


def escape_text(value: str) -> str:
    """A text with escapes for everything that is not Unicode, such as bytes of a file name that are not UTF-8."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()


class _Unwritable(ValueError):
    """A value that cannot be written; the message begins with its place in the record."""


def _check(record: Record) -> None:
    place = "name"
    try:
        _check_text(record.name)
        for place in ("label", "split", "group"):
            if (value := getattr(record, place)) is not None:
                _check_text(value)
        place = "refused"
        for part in record.refused or ():
            _check_text(part)
        place = "captions"
        _expect(record.captions, tuple | list, "a list")
        for i, caption in enumerate(record.captions):
            place = f"captions.{i}"
            _check_text(caption)
        place = "image"
        _expect(record.image, bytes | str | Slice | Cell, "a picture or its place")
        place = "distribution"
        if record.distribution is not None:
            _expect(record.distribution, dict, "an object")
            _check_distribution(record.distribution)
        place = "attributes"
        _expect(record.attributes, dict, "an object")
        _check_value(record.attributes)
        place = "persons"
        _expect(record.persons, tuple | list | None, "a list")
        for i, person in enumerate(record.persons or ()):
            place = f"persons.{i}"
            _expect(person, Person, "a person")
            place = f"persons.{i}.labels"
            _check_value(person.labels)
    except _Unwritable as problem:
        raise _Unwritable(f"{place}{problem}") from None


def _check_distribution(shares: dict[Any, Any]) -> None:
    for label, share in shares.items():
        _check_text(label)
        if (
            isinstance(share, bool)
            or not isinstance(share, int | float)
            or not math.isfinite(share)
            or share < 0
        ):
            raise _Unwritable(f".{label}: {share!r} is not a share; shares are finite and not negative")
    total = math.fsum(shares.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise _Unwritable(f": its shares sum to {total:.6g}, not to 1; give counts and percentages as votes")


def _check_value(value: Any, depth: int = MAX_DEPTH) -> None:
    """Raises _Unwritable for a value that is not JSON, or that JSON readers cannot read."""
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _Unwritable(f": {value} is not a number in JSON")
    elif isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise _Unwritable(": a whole number of more than 3,000 digits")
    elif isinstance(value, dict | list | tuple):
        if depth == 0:
            raise _Unwritable(f": nested deeper than {MAX_DEPTH} levels")
        is_object, place = isinstance(value, dict), None
        try:
            for place, item in value.items() if isinstance(value, dict) else enumerate(value):
                if is_object:
                    _check_text(place)
                _check_value(item, depth - 1)
        except _Unwritable as problem:
            raise _Unwritable(f".{place}{problem}") from None
    elif value is not None:
        raise _Unwritable(f": {type(value).__name__} is not a JSON value")


def _check_text(value: Any) -> None:
    """Raises _Unwritable for a value that is not a text, or has no UTF-8 form."""
    if not isinstance(value, str):
        raise _Unwritable(f": {type(value).__name__}, but a text is expected")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _Unwritable(f": {value[error.start]!r} at character {error.start} is not Unicode") from None


def _is_text(value: Any) -> bool:
    try:
        _check_text(value)
    except _Unwritable:
        return False
    return True


def _expect(value: Any, kind: Any, named: str) -> None:
    if not isinstance(value, kind):
        raise _Unwritable(f": {type(value).__name__}, but {named} is expected")
