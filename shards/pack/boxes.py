"""Boxes that a source brings, in the frame of the upright picture.

Annotators' tools mostly show the pixels as they are stored, while a shard's boxes are fractions of the picture as EXIF
turns it. Only the picture itself says how it is turned, so that this waits until its bytes are here.
"""

from dataclasses import replace

from shards.pictures import opened, orientation
from shards.sources import Record

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 as fractions of width and height."""

# EXIF orientation (EXIF 2.3, tag 0x0112) -> where a point of the stored picture lies in the upright one.
_TURNS = {
    1: lambda x, y: (x, y),
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (1 - y, x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (y, 1 - x),
}


def turn_box(box: Box, orientation: int) -> Box:
    """A box of the stored picture as one of the upright picture; `orientation` is EXIF's, 1 to 8."""
    turn = _TURNS[orientation]
    (xa, ya), (xb, yb) = turn(box[0], box[1]), turn(box[2], box[3])
    return min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)


def with_upright_boxes(record: Record, data: bytes) -> Record:
    """The record of a picture (`data`: its encoded bytes) with its boxes turned as EXIF turns the picture.

    They stay where the source states no size (they are of the upright picture then), and where the stated size lies
    the other way than the stored one: whoever annotated a wide file as a tall picture saw it upright.

    Raises:
        BadPicture: if the picture's header cannot be read. That there are no bytes at all is for others to say.
    """
    if not record.persons or record.boxes_size is None or not data:
        return record
    with opened(data) as image:
        turn, (width, height) = orientation(image), image.size
    stated_width, stated_height = record.boxes_size
    was_upright = turn >= 5 and (width - height) * (stated_width - stated_height) < 0
    if turn == 1 or was_upright:
        return record
    return replace(
        record, persons=tuple(replace(person, box=turn_box(person.box, turn)) for person in record.persons)
    )
