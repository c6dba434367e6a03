"""What a packer's worker does with records: read, check, shrink, filter, caption, look for persons, encode."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.detect.registry import make_detector
from shards.detect.types import Person, PersonDetector
from shards.format.encode import index_fields, members
from shards.format.sample import Sample, make_key
from shards.pack.reencode import Shrink, shrink
from shards.pack.spool import parse
from shards.pictures import BadPicture, check_picture, open_picture, read_orientation, swaps_sides, turn_box
from shards.sources import Record
from shards.sources.fetch import fetch_all
from uniemox_dist.core.files import sha256_bytes

if TYPE_CHECKING:  # pydantic takes its time to load, and most packs compose no captions
    from shards.pack.captions import Captioner

DETECTOR_SIDE = 640
"""Pixels that each side of a JPEG keeps, at least, where a detector looks: larger pictures decode faster smaller,
and detectors take 320 to 640."""


@dataclass(frozen=True)
class Filters:
    """Which pictures are kept; None: no limit."""

    side: tuple[int, int | None] = (0, None)
    """Pixels of the shorter side: at least, at most."""
    aspect: float | None = None
    """Longer over shorter side, at most."""
    caption: tuple[int, int | None] = (0, None)
    """Characters of the first caption: at least, at most."""

    def refusal(self, width: int, height: int, captions: Sequence[str]) -> tuple[str, str] | None:
        """(reason, detail) if a picture is not kept."""
        side, aspect = min(width, height), max(width, height) / min(width, height)
        if not _within(side, self.side):
            return "side", f"shorter side of {side} pixels, asked for {_shown(self.side)}"
        if self.aspect is not None and aspect > self.aspect:
            return (
                "aspect",
                f"{width} x {height} pixels are {aspect:.2f} : 1, asked for {self.aspect:g} at most",
            )
        length = len(captions[0]) if captions else 0
        if not _within(length, self.caption):
            return "caption", f"{length} characters, asked for {_shown(self.caption)}"
        return None


@dataclass(frozen=True)
class Preparation:
    """Everything that decides what becomes of one record."""

    persons: str = "nanodet"
    check: str = "decode"
    shrink: Shrink = field(default_factory=Shrink)
    filters: Filters = field(default_factory=Filters)
    captioner: "Captioner | None" = None
    folder: Path = Path()
    """Of the spool."""


@dataclass(frozen=True)
class Rejected:
    """A record that was refused, and why."""

    source: str
    reason: str
    detail: str
    length = 0
    """It has no bytes in a batch."""


@dataclass(frozen=True)
class Ready:
    """A sample whose tar members are `length` bytes of its batch's data."""

    source: str
    length: int
    image_length: int
    fields: dict[str, Any]


Item = Ready | Rejected


@dataclass(frozen=True)
class Batch:
    """What became of some records, in their order."""

    data: bytes | memoryview
    """The tar members of all that are ready, one sample after the other. Valid until the next batch is asked for."""
    items: list[Item]


class Preparer:
    """The work of one process. Not for pickling: it holds the detector."""

    def __init__(self, preparation: Preparation) -> None:
        self.settings = preparation
        self.detector: PersonDetector = make_detector(preparation.persons, threads=1)
        self.looks = preparation.persons not in ("none", "source")

    def __call__(
        self, lines: list[bytes], images: list[bytes | str | None]
    ) -> tuple[list[bytes], list[Item]]:
        """(tar members, what became of each record) for the records of some spooled lines; `images` stand for
        pictures that were fetched already."""
        records = [parse(line, self.settings.folder) for line in lines]
        records = [r if i is None else replace(r, image=i) for r, i in zip(records, images)]
        wanted = [record for record in records if record.refused is None]
        fetched = iter(fetch_all([record.image for record in wanted]))
        seen = [
            Rejected(record.name, *record.refused) if record.refused else self._see(record, next(fetched))
            for record in records
        ]
        look = [item for item in seen if isinstance(item, _Seen) and item.rgb_HW3 is not None]
        for item, persons in zip(
            look, self.detector.detect([item.rgb_HW3 for item in look if item.rgb_HW3 is not None])
        ):
            item.persons = tuple(persons)
        parts: list[bytes] = []
        items: list[Item] = []
        for one in seen:
            if isinstance(one, Rejected):
                items.append(one)
                continue
            sample = one.sample()
            pieces = members(sample)
            parts += pieces
            items.append(
                Ready(one.record.name, sum(map(len, pieces)), len(sample.image), index_fields(sample))
            )
        return parts, items

    def _see(self, record: Record, data: bytes | BadPicture) -> "_Seen | Rejected":
        settings = self.settings
        look = self.looks and record.persons is None
        try:
            if isinstance(data, BadPicture):
                raise data
            record = with_upright_boxes(record, data)
            shrinks = settings.shrink.max_side or settings.shrink.min_side
            check = "header" if shrinks else settings.check
            picture = check_picture(
                data, check=check, pixels_side=DETECTOR_SIDE if look and not shrinks else None
            )
            width, height, rgb = picture.width, picture.height, picture.rgb_HW3
            captions = record.captions
            if settings.captioner is not None:
                captions = settings.captioner.captions(captions, record.label, record.attributes)
            if refusal := settings.filters.refusal(width, height, captions):
                return Rejected(record.name, *refusal)
            if shrinks:
                scale = settings.shrink.scale(width, height)
                if scale < 1:
                    data, rgb = shrink(data, scale, settings.shrink.quality)
                    height, width = rgb.shape[:2]
                else:
                    rgb = check_picture(data, pixels_side=DETECTOR_SIDE if look else None).rgb_HW3
        except BadPicture as bad:
            return Rejected(record.name, bad.reason, bad.detail)
        return _Seen(record, data, picture.extension, width, height, captions, rgb if look else None)


@dataclass
class _Seen:
    """A record whose picture was checked, waiting for its persons."""

    record: Record
    data: bytes
    extension: str
    width: int
    height: int
    captions: tuple[str, ...]
    rgb_HW3: np.ndarray | None
    persons: tuple[Person, ...] = ()

    def sample(self) -> Sample:
        record = self.record
        persons = record.persons if record.persons is not None else self.persons
        return Sample(
            key=make_key(record.name),
            image=self.data,
            extension=self.extension,
            width=self.width,
            height=self.height,
            source=record.name,
            captions=self.captions,
            label=record.label,
            attributes=record.attributes,
            persons=tuple(sorted(persons, key=lambda person: -person.score)),
            image_sha256=sha256_bytes(self.data),
        )


def with_upright_boxes(record: Record, data: bytes) -> Record:
    """A record with its boxes in the frame of the upright picture; `data` holds the encoded picture.

    Most annotation tools show pixels as they are stored, while a shard's boxes are fractions of the upright picture.
    Boxes stay unchanged if the source states no size (they are fractions of the upright picture then), and if the
    stated size has the other orientation than the stored one: an annotator who calls a wide file tall saw it upright.

    Raises:
        BadPicture: if the picture's header cannot be read. Empty `data` is left to `check_picture`.
    """
    if not record.persons or record.boxes_size is None or not data:
        return record
    with open_picture(data) as image:
        orientation, (width, height) = read_orientation(image), image.size
    stated_width, stated_height = record.boxes_size
    was_upright = swaps_sides(orientation) and (width - height) * (stated_width - stated_height) < 0
    if orientation == 1 or was_upright:
        return record
    turned = (replace(person, box=turn_box(person.box, orientation)) for person in record.persons)
    return replace(record, persons=tuple(turned))


def _within(value: int, limits: tuple[int, int | None]) -> bool:
    return limits[0] <= value and (limits[1] is None or value <= limits[1])


def _shown(limits: tuple[int, int | None]) -> str:
    return f"at least {limits[0]}" if limits[1] is None else f"{limits[0]} to {limits[1]}"
