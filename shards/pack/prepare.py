"""Prepares records in a packing worker: read, check, shrink, filter, caption, detect persons, encode."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.detect.registry import make_detector
from shards.detect.types import NONE_INSIDE, Person, PersonDetector, by_area
from shards.format.encode import encode_members, index_fields
from shards.format.sample import EXTENSIONS, Sample, make_key
from shards.pack.shrink import Shrink, reencode
from shards.pack.spool import parse_record
from shards.pictures.decode import check_picture, open_picture
from shards.pictures.formats import HEAD_BYTES, BadPicture, identify_format
from shards.pictures.orientation import read_orientation, swaps_sides, turn_box
from shards.sources import Record
from shards.sources.files import fetch_images
from shards.sources.stores import answers_of
from uniemox_dist.core.files import sha256_bytes

if TYPE_CHECKING:  # pydantic is slow to import, and most packs compose no captions
    from shards.pack.captions import Captioner

DETECTOR_SIDE = 640
"""Smallest side of a JPEG that is decoded for a detector, in pixels. Larger JPEGs are decoded at a reduced size, which
is faster; detectors take 320 to 640 pixels."""


@dataclass(frozen=True)
class Filters:
    """Limits for the pictures that are kept; None: no limit."""

    side: tuple[int, int | None] = (0, None)
    """Smallest and largest shorter side, pixels."""
    aspect: float | None = None
    """Largest ratio of longer to shorter side."""
    caption: tuple[int, int | None] = (0, None)
    """Smallest and largest number of characters of the first caption."""

    def check(self, width: int, height: int, captions: Sequence[str]) -> tuple[str, str] | None:
        """(reason, detail) if a picture is not kept, else None."""
        side, aspect = min(width, height), max(width, height) / min(width, height)
        if not _within(side, self.side):
            return "side", f"shorter side of {side} pixels, wanted {_format_limits(self.side)}"
        if self.aspect is not None and aspect > self.aspect:
            return (
                "aspect",
                f"{width} x {height} pixels are {aspect:.2f} : 1, wanted at most {self.aspect:g} : 1",
            )
        length = len(captions[0]) if captions else 0
        if not _within(length, self.caption):
            return "caption", f"{length} characters, wanted {_format_limits(self.caption)}"
        return None


@dataclass(frozen=True)
class Preparation:
    """All settings that determine the result for one record."""

    persons: str = "nanodet"
    check: str = "decode"
    shrink: Shrink = field(default_factory=Shrink)
    filters: Filters = field(default_factory=Filters)
    captioner: "Captioner | None" = None
    folder: Path = Path()
    """The spool's folder."""
    roots: tuple[str, ...] = ()
    """Local folders that links of pictures named below them may not leave."""
    answered: tuple[str, ...] = ()
    """A URL of each kind of server that has answered before: a SOURCE in a store when it was listed, and pictures that
    an interrupted pack had read. A table on the web says nothing of the servers of its pictures."""


@dataclass(frozen=True)
class Rejected:
    """A record that was refused, and why."""

    source: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Ready:
    """A prepared sample; its tar members are `length` bytes of its batch's data."""

    source: str
    length: int
    image_length: int
    fields: dict[str, Any]
    converted: str | None = None
    """The format of the original picture if it was converted, such as GIF."""


Item = Ready | Rejected


@dataclass(frozen=True)
class Batch:
    """The results for some records, in their order."""

    data: bytes | memoryview
    """The tar members of all ready samples, one after the other. Valid until the next batch is requested."""
    items: list[Item]


class Preparer:
    """Prepares records in one process. Cannot be pickled, because it holds the detector."""

    def __init__(self, preparation: Preparation) -> None:
        self.settings = preparation
        for url in preparation.answered:
            answers_of(url).add(True)
        self.detector: PersonDetector = make_detector(preparation.persons, threads=1)
        self.detects = preparation.persons not in ("none", "source")

    def __call__(
        self, lines: list[bytes], images: Sequence[bytes | str | BadPicture | None]
    ) -> tuple[list[bytes], list[Item]]:
        """Prepares the records of some spooled lines; returns (tar members, result of each record).

        `images` are pictures that the parent has read already, their paths, or why they cannot be read; None for the
        others.
        """
        records = [parse_record(line, self.settings.folder) for line in lines]
        wanted = [
            record.image if image is None else image
            for record, image in zip(records, images)
            if record.refused is None
        ]
        fetched = iter(fetch_images(wanted, self.settings.roots))
        checked = [
            Rejected(record.name, *record.refused) if record.refused else self._check(record, next(fetched))
            for record in records
        ]
        waiting = [item for item in checked if isinstance(item, _Checked) and item.rgb_HW3 is not None]
        pictures = [item.rgb_HW3 for item in waiting if item.rgb_HW3 is not None]
        for found, persons in zip(waiting, self.detector.detect(pictures)):
            found.persons = tuple(persons)
        parts: list[bytes] = []
        items: list[Item] = []
        for item in checked:
            if isinstance(item, Rejected):
                items.append(item)
                continue
            sample = item.sample()
            pieces = encode_members(sample)
            parts += pieces
            length = sum(map(len, pieces))
            items.append(
                Ready(item.record.name, length, len(sample.image), index_fields(sample), item.converted)
            )
        return parts, items

    def _check(self, record: Record, data: bytes | BadPicture) -> "_Checked | Rejected":
        settings = self.settings
        detects = self.detects and record.persons is None
        try:
            if isinstance(data, BadPicture):
                raise data
            record = turn_boxes_upright(scale_boxes(record, data), data)
            shrinks = settings.shrink.max_side or settings.shrink.min_side
            check = "header" if shrinks else settings.check
            found = identify_format(data[:HEAD_BYTES])
            stored = found is None or found.name in EXTENSIONS
            side = DETECTOR_SIDE if detects and not shrinks and stored else None
            picture = check_picture(data, check=check if stored else "header", pixels_side=side)
            width, height, rgb = picture.width, picture.height, picture.rgb_HW3
            captions = record.captions
            if settings.captioner is not None:
                captions = settings.captioner.captions(captions, record.label, record.attributes)
            if refusal := settings.filters.check(width, height, captions):
                return Rejected(record.name, *refusal)
            scale = settings.shrink.scale(width, height)
            extension, converted = EXTENSIONS.get(picture.format, ""), None
            if scale < 1 or not stored:
                data, extension, rgb, frames = reencode(data, scale, settings.shrink.quality)
                height, width = rgb.shape[:2]
                if not stored:
                    converted = picture.format
                    record = note_original(record, converted, frames)
            elif shrinks:
                rgb = check_picture(data, pixels_side=DETECTOR_SIDE if detects else None).rgb_HW3
        except BadPicture as bad:
            return Rejected(record.name, bad.reason, bad.detail)
        return _Checked(record, data, extension, width, height, captions, rgb if detects else None, converted)


@dataclass
class _Checked:
    """A record whose picture was checked; persons are not detected yet."""

    record: Record
    data: bytes
    extension: str
    width: int
    height: int
    captions: tuple[str, ...]
    rgb_HW3: np.ndarray | None
    converted: str | None
    persons: tuple[Person, ...] = ()

    def sample(self) -> Sample:
        record = self.record
        persons = record.persons if record.persons is not None else self.persons
        by_score = tuple(sorted(persons, key=lambda person: -person.score))
        record = replace(record, captions=self.captions, persons=by_score)
        return make_sample(record, self.data, self.extension, self.width, self.height)


def note_original(record: Record, form: str, frames: int) -> Record:
    """A record whose attributes state the format of its picture before conversion, and how many pictures the file
    has if it has several."""
    more = {"original_format": form} | ({"original_frames": frames} if frames > 1 else {})
    return replace(record, attributes={**record.attributes, **more})


def make_sample(record: Record, data: bytes, extension: str, width: int, height: int) -> Sample:
    """The sample of a record with these encoded bytes of an upright size in pixels."""
    return Sample(
        key=make_key(record.name),
        image=data,
        extension=extension,
        width=width,
        height=height,
        source=record.name,
        captions=record.captions,
        label=record.label,
        distribution=record.distribution,
        attributes=record.attributes,
        persons=record.persons or (),
        image_sha256=sha256_bytes(data),
    )


def scale_boxes(record: Record, data: bytes) -> Record:
    """A record with boxes as fractions of the stored picture, instead of in its pixels; the largest person first.

    Boxes that reach over the edge are clipped; persons of whom nothing remains are left out.

    Raises:
        BadPicture: if no person remains, or the picture's header cannot be read. Empty `data` is left to
            `check_picture`.
    """
    if record.pixel_boxes is None or not data:
        return record
    with open_picture(data) as image:
        width, height = image.size
    persons = by_area(
        replace(person, box=(x1 / width, y1 / height, x2 / width, y2 / height))
        for person, (x1, y1, x2, y2) in zip(record.persons or (), record.pixel_boxes)
    )
    if not persons:
        raise BadPicture("annotation", NONE_INSIDE)
    return replace(record, persons=persons, pixel_boxes=None, boxes_size=(width, height))


def turn_boxes_upright(record: Record, data: bytes) -> Record:
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


def _format_limits(limits: tuple[int, int | None]) -> str:
    return f"at least {limits[0]}" if limits[1] is None else f"{limits[0]} to {limits[1]}"
