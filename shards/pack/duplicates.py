"""Finds pictures that were packed before, by the hash of their stored bytes, and repeated keys."""

import re
from collections.abc import Iterable

from shards.pack.append import Existing, PackedBefore
from shards.pack.listing import Listing, key_hash
from shards.pack.spool import parse_record
from uniemox_dist.core.formatting import counted

_LOST = re.compile(r"; ([\d,]+) captions? of this copy left out$")


class PackedSamples:
    """The samples packed so far; needs about 150 bytes of memory per sample, and 400 for one of the data set to which
    a pack is appended."""

    def __init__(self, listing: Listing, existing: Existing | None = None) -> None:
        self._listing = listing
        self._before: dict[int, PackedBefore] = {}
        self._keys_before: set[str] = set()
        for sha256, key, sample in existing.samples() if existing is not None else ():
            self._before[int(sha256[:32], 16)] = sample
            self._keys_before.add(key)
        self._shared = listing.shared_keys()
        self._first: dict[int, int] = {}  # 128 bits of the content's hash -> record number
        self._keys: set[str] = set()

    def check(self, number: int, key: str, image_sha256: str) -> tuple[str, str] | None:
        """(reason, detail) if a sample was packed before; otherwise remembers it and returns None."""
        content = int(image_sha256[:32], 16)
        own = self._listing.split(number), self._listing.label(number)
        if (before := self._before.get(content)) is not None:
            return describe_duplicate(*own, before.split, before.label, before.name)
        if key in self._keys_before:
            return "duplicate_key", f"a sample of the data set has the same key {key}"
        first = self._first.get(content)
        if first is not None:
            kept, copy = (parse_record(self._listing.spool.line(n)) for n in (first, number))
            other = self._listing.split(first), self._listing.label(first)
            reason, detail = describe_duplicate(*own, *other, kept.name)
            shares = kept.distribution, copy.distribution
            if reason == "duplicate" and None not in shares and shares[0] != shares[1]:
                return "conflict", f"the same picture as {kept.name}, which has another distribution"
            lost = len(set(copy.captions) - set(kept.captions))
            return reason, detail + (f"; {counted(lost, 'caption')} of this copy left out" if lost else "")
        if self._shared and key_hash(key) in self._shared:
            if key in self._keys:
                return "duplicate_key", f"another record has the same key {key}"
            self._keys.add(key)
        self._first[content] = number
        return None


def count_lost_captions(details: Iterable[str]) -> int:
    """The captions that are lost with refused copies, from the details of all refusals."""
    return sum(int(found[1].replace(",", "")) for detail in details if (found := _LOST.search(detail)))


def describe_duplicate(
    split: str, label: str | None, first_split: str, first_label: str | None, first: str
) -> tuple[str, str]:
    """(reason, detail) for a picture with the same bytes as `first`, which was packed before."""
    differ = label != first_label and label is not None and first_label is not None
    labels = f", which is labelled {first_label!r}, not {label!r}" if differ else ""
    if split != first_split:
        return "leak", f"the same picture as {first} of split {first_split}{labels}"
    return ("conflict" if differ else "duplicate"), f"the same picture as {first}{labels}"
