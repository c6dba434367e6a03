"""Joins several rows that describe one picture, such as one row per caption, into one record."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shards.detect.types import NONE_INSIDE, by_area
from shards.sources import Record

_KEPT = ("test", "val")
"""Splits in which a picture stays if it is named in several."""


def join_rows(rows: Sequence[Record]) -> Record:
    """One record of several for the same picture, in the order of the source: all captions once each.

    Name and picture are the first row's, the split is the first that is stated. An attribute whose values differ
    becomes the list of its values, one for each row of the tables that have it (None where such a row has none).
    Rows that state different labels, distributions or persons are refused as `conflict`. Rows that are votes keep
    their captions in number, so that these are in the order of attributes that differ. A row without a vote among
    them counts for nothing.
    """
    first = rows[0]
    if (refused := next((row for row in rows if row.refused is not None), None)) is not None:
        return replace(first, refused=refused.refused)
    if first.is_person:
        return _join_persons(rows)
    if len(rows) == 1:
        return first
    votes = [row.distribution or {} for row in rows if row.is_vote]
    if all(row.is_vote or row.distribution is row.label is None for row in rows) and votes:
        shares = {name: math.fsum(v.get(name, 0) for v in votes) / len(votes) for v in votes for name in v}
        rows = [replace(row, distribution=shares, label=None) for row in rows]
    captions = [caption for row in rows for caption in row.captions]
    record = replace(
        first,
        captions=tuple(captions if votes else dict.fromkeys(captions)),
        label=next((row.label for row in rows if row.label is not None), None),
        split=next((row.split for row in rows if row.split is not None), None),
        distribution=next((row.distribution for row in rows if row.distribution is not None), None),
        persons=next((row.persons for row in rows if row.persons is not None), None),
        attributes=_join_attributes(rows),
    )
    for what in _PLURAL:
        stated = [row for row in rows if getattr(row, what) is not None]
        other = next((row for row in stated if getattr(row, what) != getattr(stated[0], what)), None)
        if other is not None:
            values = f" ({stated[0].label!r:.60} and {other.label!r:.60})" if what == "label" else ""
            names = f" {stated[0].name} and {other.name}" if stated[0].name != other.name else ""
            detail = f"its rows{names} state different {_PLURAL[what]}{values}"
            return replace(record, refused=("conflict", detail))
    return record


def keep_one_split(record: Record, rows: list[Record]) -> tuple[list[Record], list[Record]]:
    """The rows of a picture without those that put it into another split, and a refused record for each of these. It
    stays in test, or else in val."""
    splits = [row.split for row in (record, *rows) if row.split is not None]
    kept = min(splits, key=lambda name: _KEPT.index(name) if name in _KEPT else len(_KEPT), default=None)
    others = [row for row in rows if row.split not in (None, kept)]
    leaks = [
        Record(
            record.name,
            b"",
            split=row.split,
            refused=("leak", f"{row.name} names it, but it is in split {kept}"),
        )
        for row in others
    ]
    return [row for row in rows if row.split in (None, kept)], leaks


def _join_persons(rows: Sequence[Record]) -> Record:
    """The record of rows that describe a person each; its label is left to the listing. Boxes in pixels are left to the
    packer; of others, persons of whom nothing is inside the picture are left out, and the largest is the first."""
    record = join_rows(
        [replace(row, is_person=False, persons=None, pixel_boxes=None, label=None) for row in rows]
    )
    boxes = tuple(box for row in rows for box in row.pixel_boxes or ())
    persons = tuple(person for row in rows for person in row.persons or ())
    if boxes:
        return replace(record, persons=persons, pixel_boxes=boxes)
    inside = by_area(persons)
    return replace(
        record, persons=inside, refused=record.refused or (None if inside else ("annotation", NONE_INSIDE))
    )


_PLURAL = {"label": "labels", "distribution": "distributions", "persons": "persons"}


def _join_attributes(rows: Sequence[Record]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row.attributes):
        tables = {row.table for row in rows if name in row.attributes}
        values = [row.attributes.get(name) for row in rows if row.table in tables]
        joined[name] = values if any(value != values[0] for value in values) else values[0]
    return joined
