"""Converts values from source files into values that a shard can hold: texts, captions, persons, JSON.

All functions raise one of the errors in `BAD_VALUE` for a value that they cannot convert; a layout then refuses that
record with the reason `annotation`.
"""

import base64
import datetime
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from shards.detect.types import Person
from shards.sources.validate import MAX_DEPTH

BAD_VALUE = (ValueError, KeyError, TypeError, OverflowError)
_INTEGRAL = re.compile(r"(-?(?:0|[1-9]\d*))\.0+")
_BOOLEANS = {"True": "true", "False": "false", "TRUE": "true", "FALSE": "false"}


def load_json(data: bytes | str, clean: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parses JSON.

    Args:
        clean: receives each object, the inner ones first; its result replaces the object.

    Raises:
        ValueError: for text that is not JSON, for JSON that is nested too deeply for Python's reader, and for an object
            that states a key twice with different values, one of which would be lost.
    """

    def make(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            _check_repeated(pairs)
        return found if clean is None else clean(found)

    try:
        return json.loads(data, object_pairs_hook=make)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _check_repeated(pairs: list[tuple[str, Any]]) -> None:
    first: dict[str, Any] = {}
    for key, value in pairs:
        if first.setdefault(key, value) != value:
            raise ValueError(f"the key {key[:60]!r} occurs twice in one object, with different values")


def parse_text(value: Any) -> str | None:
    """A single value as text, without outer white space; None for a missing one (null, NaN, a blank text)."""
    if value is None or isinstance(value, str):
        return (value and value.strip()) or None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict | list | tuple | bytes):
        raise TypeError(f"holds {_kind(value)}, but a text is expected")
    return str(value)


def parse_label(value: Any) -> str | None:
    """A label as text; None for a missing one.

    A label does not depend on the format of its file, or on gaps in its column: `1.0` is `1`, as a number and as text,
    and booleans are `true` and `false`. A list of one label is that label.
    """
    if isinstance(value, list | tuple):
        labels = [label for label in map(parse_label, value) if label is not None]
        if len(labels) > 1:
            raise TypeError(
                f"holds {len(labels)} labels ({', '.join(labels)[:60]}), but a sample has one; give several as an "
                'object of shares such as {"joy": 1, "awe": 1}, with --column votes=NAME'
            )
        return labels[0] if labels else None
    text = parse_text(value)
    if text is None:
        return None
    integral = _INTEGRAL.fullmatch(text)
    if integral is not None:
        return "0" if integral[1] == "-0" else integral[1]
    return _BOOLEANS.get(text, text)


def parse_captions(value: Any) -> tuple[str, ...]:
    """One caption or a list of captions, without empty ones; numbers become text."""
    found = map(parse_text, value if isinstance(value, list | tuple) else [value])
    return tuple(caption for caption in found if caption)


def parse_persons(value: Any) -> tuple[Person, ...] | None:
    """Persons from a list of objects with `box`, `score` (default 1) and `labels`, or from the same as JSON text."""
    entries = load_json(value) if isinstance(value, str) and value else value
    if not entries:
        return None
    if not isinstance(entries, list):
        raise TypeError(f"holds {_kind(entries)}, but a list of persons is expected")
    return tuple(map(_parse_person, entries))


def _parse_person(entry: Any) -> Person:
    if not isinstance(entry, Mapping):
        raise TypeError(f"holds {_kind(entry)}, but a box, score and labels are expected")
    labels = entry.get("labels") or {}
    labels = load_json(labels) if isinstance(labels, str) else labels
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels: holds {_kind(labels)}, but an object is expected")
    return Person.from_json(
        {"box": entry["box"], "score": entry.get("score", 1.0), "labels": to_json_value(labels)}
    )


def parse_distribution(value: Any) -> dict[str, float] | None:
    """Labels and their shares from an object, or from the same as JSON text; None without one. Labels without a share
    (null) are left out; NaN stays."""
    text = value.strip() if isinstance(value, str) else None
    if text and not text.startswith("{"):
        raise ValueError(
            f"{text[:40]!r} is not a JSON object of labels and their shares; rename the column if it is something else"
        )
    entries = load_json(text) if text else None if text == "" else value
    if entries is None or entries == {} or (isinstance(entries, float) and math.isnan(entries)):
        return None
    if not isinstance(entries, Mapping):
        raise TypeError(f"holds {_kind(entries)}, but an object of labels and their shares is expected")
    shares: dict[str, float] = {}
    for label, entry in entries.items():
        try:
            share = parse_real(entry)
        except BAD_VALUE as error:
            raise ValueError(f"the share of {label!r}: {error}") from None
        if share is not None:
            shares[str(label).strip()] = share
    return shares or None


def parse_real(value: Any) -> float | None:
    """A number, also as text; None for a missing one (null, a blank text)."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"holds {_kind(value)}, but a number is expected")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None


def parse_dimension(value: Any) -> float | None:
    """A number, also as text; None for a missing one (null, NaN, a blank text)."""
    number = parse_real(value)
    return None if number is None or math.isnan(number) else number


def load_array(data: bytes) -> np.ndarray:
    """The array of a `.npy` file. Its header is compared with its size first, so that no header can ask for memory.

    Raises:
        ValueError: for another or a damaged file, and for pickled objects, which are not loaded.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, kind = read(file)
        if kind.hasobject:
            raise ValueError("holds pickled objects, which are not loaded")
        stated, held = math.prod(shape) * kind.itemsize, len(data) - file.tell()
        if stated != held or min(shape, default=0) < 0:
            raise ValueError(f"has {held} bytes of values, but its header states {stated}")
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises many types on damaged headers
        raise ValueError(f"not an array: {error}") from None
    return array


def parse_array(data: bytes) -> str | int | float:
    """The only value of a `.npy` file: a text or a number. Raises ValueError for other files."""
    array = load_array(data)
    if array.size != 1:
        raise ValueError(f"holds {array.size} values, but one is expected")
    value: Any = array.item()
    if not isinstance(value, str | int | float):
        raise ValueError(f"holds {_kind(value)}, but a text or a number is expected")
    return value


def divide_votes(votes: Mapping[str, float] | None) -> dict[str, float] | None:
    """Shares of votes, counts or percentages: each divided by the sum of all."""
    if votes is None:
        return None
    total = sum(votes.values())
    if not math.isfinite(total) or total <= 0 or min(votes.values()) < 0:
        stated = ", ".join(f"{label} {value:g}" for label, value in votes.items())
        raise ValueError(f"no shares can be made of the votes {stated}")
    return {label: value / total for label, value in votes.items()}


def most_likely(distribution: Mapping[str, float]) -> str | None:
    """The label with the largest share; None if several labels have it."""
    most = max(distribution.values())
    first, *others = [label for label, share in distribution.items() if share == most]
    return None if others else first


def parse_attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON values, without missing ones."""
    found = {str(name): to_json_value(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value not in (None, "")}


def to_json_value(value: Any, depth: int = 0) -> Any:
    """A JSON value: times become ISO 8601, NaN null, bytes base64, and other types their text."""
    if depth > MAX_DEPTH:
        raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): to_json_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item, depth + 1) for item in value]
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
