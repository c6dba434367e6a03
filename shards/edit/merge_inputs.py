"""What `uniemox shards merge` joins: all parts of a pack, or unrelated data sets. Checked before any write."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shards.format.manifest import Manifest, find_manifest_folders, read_manifest
from shards.format.rejected import REJECTED, read_rejected
from shards.pack.partial import PART
from shards.storage import Place, is_local
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import convert_read_errors, describe_missing_folder, hide_secrets


@dataclass
class Input:
    """A part or a data set to be joined."""

    name: str
    """Its name in lists; "" for parts of one pack, whose records need none."""
    folder: Place
    found: list[tuple[str, Place, Manifest]]
    """(split, folder, manifest) of its data sets."""
    rejected: list[dict[str, str]]
    records: int
    prefix: str = ""
    """What the names of its shards begin with in the result."""
    note: dict[str, Any] = field(default_factory=dict)
    """The part.json of a part."""


def open_inputs(parts: Sequence[Place]) -> list[Input]:
    """Reads what `merge` joins: all parts of one pack in their order, or unrelated data sets in the given order.

    Raises:
        UserError: as `merge` for its parts.
    """
    if not parts:
        raise UserError("PARTS: none given; give the folders of all parts, or of data sets")
    are_parts = [(folder / PART).is_file() for folder in parts]
    if all(are_parts):
        return [_open_part(folder, note) for folder, note in _check_parts(parts)]
    if any(are_parts):
        part, other = parts[are_parts.index(True)], parts[are_parts.index(False)]
        _open_data_set(other, "", "")
        raise UserError(
            f"PARTS={hide_secrets(part)}: is a part of a parallel pack, but {hide_secrets(other)} is not; join the "
            "parts first, then merge the result"
        )
    return _open_data_sets(parts)


def _open_data_sets(folders: Sequence[Place]) -> list[Input]:
    if len(folders) == 1:
        raise UserError(
            f"PARTS={hide_secrets(folders[0])}: one data set; give at least two, or all parts of a pack"
        )
    names = _unique_names(folders)
    inputs = [
        _open_data_set(folder, name, f"m{number:03d}-")
        for number, (folder, name) in enumerate(zip(folders, names), 1)
    ]
    seen: dict[str, Place] = {}
    for given in inputs:
        for _, folder, manifest in given.found:
            if (first := seen.setdefault(manifest.identity, folder)) is not folder:
                raise UserError(
                    f"PARTS={folder}: is the same data set as {hide_secrets(first)}; give it once"
                )
    with_splits = [given for given in inputs if given.found[0][0]]
    without = [given for given in inputs if not given.found[0][0]]
    if with_splits and without:
        raise UserError(
            f"PARTS={hide_secrets(without[0].folder)}: has no splits, but {hide_secrets(with_splits[0].folder)} has "
            f"{', '.join(split for split, _, _ in with_splits[0].found)}; divide it with `uniemox shards split`, or "
            "merge it with one split only"
        )
    return inputs


def _unique_names(folders: Sequence[Place]) -> list[str]:
    """Short names for lists: that of the folder, with its parent's if several have the same."""
    parts = [[part for part in hide_secrets(folder).split("/") if part] or ["."] for folder in folders]
    short = Counter(words[-1] for words in parts)
    names = ["/".join(words[-1:] if short[words[-1]] == 1 else words[-2:]) for words in parts]
    return [name if names.count(name) == 1 else f"{number}:{name}" for number, name in enumerate(names, 1)]


def _open_data_set(folder: Place, name: str, prefix: str) -> Input:
    found = _find_splits(folder)
    if not found:
        missing = is_local(folder) and not folder.is_dir()
        problem = describe_missing_folder(folder) if missing else "has no manifest.json"
        raise UserError(
            f"PARTS={folder}: {problem}; give data sets, or all folders that `shards pack --part I/N` "
            "completed"
        )
    rejected = read_rejected(folder) or []
    samples = sum(manifest.samples for _, _, manifest in found)
    return Input(name, folder, found, rejected, samples + len(rejected), prefix)


def _find_splits(folder: Place) -> list[tuple[str, Place, Manifest]]:
    return [
        (data.name if data != folder else "", data, read_manifest(data, "PARTS"))
        for data in find_manifest_folders(folder)
    ]


def _check_parts(parts: Sequence[Place]) -> list[tuple[Place, dict[str, Any]]]:
    """The parts in order, each with its part.json.

    Raises:
        UserError: as `merge` for its parts.
    """
    found: dict[int, tuple[Place, dict[str, Any]]] = {}
    for folder in parts:
        note = _read_part(folder)
        number, of = note["part"]
        if number in found:
            raise UserError(
                f"PARTS={folder}: is part {number}/{of}, but so is {found[number][0]}; give each part once"
            )
        found[number] = (folder, note)
    ordered = [found[number] for number in sorted(found)]
    first, stated = ordered[0]
    for folder, note in ordered[1:]:
        for fact in ("settings", "captions", "detector", "licence", "source_sha256"):
            if note.get(fact) != stated.get(fact):
                what = "source" if fact == "source_sha256" else fact
                raise UserError(
                    f"PARTS={folder}: was packed with a different {what} than {first}; pack it again, or join the "
                    "parts of each pack first"
                )
    of = stated["part"][1]
    missing = sorted(set(range(1, of + 1)) - set(found))
    if missing or any(note["part"][1] != of for _, note in ordered):
        lacking = ", ".join(f"{number}/{of}" for number in missing) or "parts with another total"
        raise UserError(f"PARTS: {lacking} are missing; give all {of} parts")
    return ordered


def _read_part(folder: Place) -> dict[str, Any]:
    """The part.json of a part: its number, and how many records it packed and refused."""
    try:
        with convert_read_errors(f"PARTS={folder}: {PART}", "pack this part again"):
            note: dict[str, Any] = json.loads((folder / PART).read_bytes())
        (number, of), records = note["part"], note["records"]
        packed, rejected = list(note["packed"].values()), list(note["rejected"].values())
        is_sound = all(type(value) is int for value in (number, of, records, *packed, *rejected))
        if not is_sound or not 1 <= number <= of or records != sum(packed) + sum(rejected):
            raise ValueError("its numbers do not add up")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"PARTS={folder}: {PART} cannot be read; pack this part again") from None
    return note


def _open_part(folder: Place, note: dict[str, Any]) -> Input:
    """
    Raises:
        UserError: if the samples or refused records of a part do not match the counts in part.json.
    """
    found = _find_splits(folder)
    rejected = read_rejected(folder)
    if rejected is None:
        raise UserError(f"PARTS={folder}: {REJECTED} is missing; pack this part again")
    reasons = Counter(row["reason"] for row in rejected)
    if {split: manifest.samples for split, _, manifest in found} != note["packed"]:
        raise UserError(f"PARTS={folder}: has other samples than its {PART} counts; pack this part again")
    if reasons != Counter(note["rejected"]):
        raise UserError(
            f"PARTS={folder}: {REJECTED} lists other records than {PART} counts; pack this part again"
        )
    return Input("", folder, found, rejected, note["records"], note=note)
