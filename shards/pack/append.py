"""Appends a pack to a finished data set (`shards pack --append`): its tars and indexes stay as they are, new shards are
numbered after them, and new manifests replace the old ones at the end."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shards.format.entries import ShardEntry
from shards.format.index import read_shard_rows
from shards.format.manifest import MANIFEST, Manifest, find_manifest_folders, read_manifest
from shards.format.rejected import read_rejected
from shards.storage import Place, is_local
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import hide_secrets

_NUMBERED = re.compile(r"(\d{6,})\.tar")
_OF_PART = (
    "settings",
    "captions",
    "labels",
    "splits",
    "detector",
    "source_sha256",
    "records",
    "rejected",
    "not_pictures",
    "converted",
    "licence",
    "dimension_ranges",
    "retried",
)
"""What the provenance keeps about each appended part."""


RETRIED = frozenset({"unreadable", "empty", "corrupt", "format", "too_large"})
"""Reasons that may be gone if a picture is read again, from a server that answers now or a file that was replaced."""


class PackedBefore(NamedTuple):
    """A sample of the finished data set."""

    split: str
    label: str | None
    name: str


@dataclass(frozen=True)
class Existing:
    """The finished data set to which a pack is appended."""

    out: Place
    manifests: dict[str, Manifest]
    """By split; "" for a data set without splits."""
    rejected: list[dict[str, str]] | None
    """The refused records of OUT; None if there is no list."""
    siblings: Mapping[str, tuple[Place, Manifest]] = field(default_factory=dict)
    """If OUT is one split of a pack: the folders and manifests of its other splits."""

    @classmethod
    def read(cls, out: Place) -> "Existing":
        """Reads the manifests at `out`.

        Raises:
            UserError: if there is no data set, or one that cannot be read.
        """
        folders = find_manifest_folders(out)
        if not folders:
            raise UserError(
                f"OUT={hide_secrets(out)}: has no data set to append to; pack it without --append first"
            )
        manifests = {folder.name if folder != out else "": read_manifest(folder, "OUT") for folder in folders}
        siblings = _find_siblings(out, manifests[""]) if "" in manifests else {}
        return cls(out, manifests, read_rejected(out), siblings)

    @property
    def identities(self) -> dict[str, str]:
        """The identity of each split."""
        return {split: manifest.identity for split, manifest in self.manifests.items()}

    def check_unchanged(self) -> None:
        """
        Raises:
            UserError: if another process has appended to the data set since it was read.
        """
        if Existing.read(self.out).identities != self.identities:
            raise UserError(
                f"OUT={hide_secrets(self.out)}: another process has changed the data set meanwhile; start again"
            )

    @property
    def licence(self) -> str | None:
        """The licence of the first pack."""
        licence = next(iter(self.manifests.values())).provenance.get("licence")
        return licence if isinstance(licence, str) else None

    def first_number(self, split: str) -> int:
        """The number of the first new shard of a split."""
        names = (entry.name for entry in self.manifests[split].shards) if split in self.manifests else ()
        return max((int(match[1]) + 1 for name in names if (match := _NUMBERED.fullmatch(name))), default=0)

    def check_splits(self, splits: Sequence[str]) -> None:
        """
        Raises:
            UserError: if the new records have splits and the data set has none, or the reverse.
        """
        if ("" in self.manifests) == all(split == "" for split in splits):
            return
        ours, theirs = (
            "no splits" if "" in some else f"the splits {', '.join(sorted(some))}"
            for some in (self.manifests.keys(), set(splits))
        )
        raise UserError(
            f"SOURCE: has {theirs}, but OUT={hide_secrets(self.out)} has {ours}; append to a data set with splits only "
            "records with splits (to one split: give OUT/<split> and records without)"
        )

    def samples(self) -> Iterator[tuple[str, str, PackedBefore]]:
        """(image's SHA-256, key, sample) of all samples, and of those in other splits of the same pack."""
        own = {split: (self.out / split if split else self.out, m) for split, m in self.manifests.items()}
        for split, (folder, manifest) in {**own, **self.siblings}.items():
            for entry in manifest.shards:
                table = read_shard_rows(folder, entry, ["key", "label", "image_sha256"])
                for row in table.to_pylist():
                    name = f"{f'{split}/' if split else ''}{entry.name}/{row['key']}"
                    yield row["image_sha256"], row["key"], PackedBefore(split, row["label"], name)

    def contains(self, settings: dict[str, Any], source_sha256: str) -> bool:
        """Whether this source was packed or appended before with these settings."""
        return any(self._compare_parts(settings, source_sha256))

    def has_only(self, settings: dict[str, Any], source_sha256: str) -> bool:
        """Whether all records came from this source with these settings."""
        return all(self._compare_parts(settings, source_sha256))

    def _compare_parts(self, settings: dict[str, Any], source_sha256: str) -> list[bool]:
        first = next(iter(self.manifests.values())).provenance
        return [
            part.get("settings") == settings and part.get("source_sha256") == source_sha256
            for part in (first, *_parts(first))
        ]

    def refused_names(self) -> frozenset[str]:
        """The names of records that `--retry-refused` tries again."""
        return frozenset(row["source"] for row in self.rejected or () if row["reason"] in RETRIED)

    def without(self, names: frozenset[str]) -> "Existing":
        """The data set as if the refused records of these names had not been in its source."""
        kept, dropped = [], Counter[str]()
        for row in self.rejected or ():
            if row["source"] in names and row["reason"] in RETRIED:
                dropped[row["reason"]] += 1
            else:
                kept.append(row)
        manifests = {}
        for split, manifest in self.manifests.items():
            stated = dict(manifest.provenance)
            left = Counter(stated.get("rejected") or {})
            left.subtract(dropped)
            stated["rejected"] = {reason: count for reason, count in left.items() if count > 0}
            if isinstance(stated.get("records"), int):
                stated["records"] -= dropped.total()
            manifests[split] = Manifest(manifest.shards, stated)
        return Existing(self.out, manifests, kept, self.siblings)

    def extended(
        self, new: Mapping[str, Sequence[ShardEntry]], provenance: dict[str, Any]
    ) -> dict[str, Manifest]:
        """The manifests with new shards, by split. Their provenance is that of the first pack, with totals of all
        records and an entry for each appended part."""
        base = next(iter(self.manifests.values())).provenance
        part = {name: provenance[name] for name in _OF_PART if name in provenance}
        part["samples"] = sum(entry.samples for entries in new.values() for entry in entries)
        found: dict[str, Manifest] = {}
        for split in sorted(self.manifests.keys() | new.keys()):
            old = self.manifests.get(split)
            before = dict(base if old is None else old.provenance)
            shards = [entry.name for entry in new.get(split, ())]
            more: dict[str, Any] = {
                **_add_counts(before, provenance),
                "appended": [*_parts(before), {**part, "shards": shards}],
            }
            if isinstance(before.get("records"), int):
                more["records"] = before["records"] + provenance["records"]
            if before.get("labels") or provenance.get("labels"):
                more["labels"] = list(dict.fromkeys([*(before.get("labels") or []), *provenance["labels"]]))
            licence = combine_licences([before.get("licence"), provenance.get("licence")])
            if licence is not None:
                more["licence"] = licence
            entries = (*(old.shards if old is not None else ()), *new.get(split, ()))
            found[split] = Manifest(entries, {**before, **more})
        return found


def _find_siblings(out: Place, own: Manifest) -> dict[str, tuple[Place, Manifest]]:
    """The data sets beside `out` that came from the same source with the same settings, by name."""
    source = [own.provenance.get(name) for name in ("source_sha256", "settings")]
    parent = out.absolute().parent if is_local(out) else out.parent
    if None in source or (parent / MANIFEST).is_file():
        return {}
    beside = [folder for folder in find_manifest_folders(parent) if folder.name != out.absolute().name]
    found = {folder.name: (folder, read_manifest(folder, "OUT")) for folder in beside}
    return {
        name: (folder, manifest)
        for name, (folder, manifest) in found.items()
        if [manifest.provenance.get(name) for name in ("source_sha256", "settings")] == source
    }


def is_append(plan: dict[str, Any] | None) -> bool:
    """Whether the plan of an interrupted pack is that of an append."""
    return plan is not None and "appended_to" in plan


def _parts(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    parts = provenance.get("appended")
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _add_counts(before: dict[str, Any], added: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The counts by name of both; those that neither has are left out, except `rejected`. A source that is read again
    has the same `not_pictures`."""
    found: dict[str, dict[str, int]] = {}
    for name in ("rejected", "not_pictures", "converted"):
        is_same = name == "not_pictures" and added.get("retried")
        total = Counter(before.get(name) or {}) + Counter({} if is_same else added.get(name) or {})
        if total or name == "rejected":
            found[name] = dict(sorted(total.items()))
    return found


def combine_licences(stated: Sequence[str | None]) -> str | None:
    """One text for several licences: each once, `unstated` if some but not all are missing."""
    names = list(
        dict.fromkeys(part for text in stated for part in (text.split(" AND ") if text else ["unstated"]))
    )
    return None if names == ["unstated"] else " AND ".join(names)
