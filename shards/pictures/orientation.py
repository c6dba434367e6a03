"""EXIF orientation: reading it, and turning pictures, arrays and boxes upright."""

import warnings
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 as fractions of width and height."""


class _Turn(NamedTuple):
    """The operations that turn a stored picture upright: first swap x and y, then mirror."""

    swaps_sides: bool
    mirrors_x: bool
    mirrors_y: bool
    transpose: Image.Transpose
    """The same operation for Pillow."""


# By EXIF orientation (EXIF 2.3, tag 0x0112); 1 is upright already.
_TURNS = {
    2: _Turn(False, True, False, Image.Transpose.FLIP_LEFT_RIGHT),
    3: _Turn(False, True, True, Image.Transpose.ROTATE_180),
    4: _Turn(False, False, True, Image.Transpose.FLIP_TOP_BOTTOM),
    5: _Turn(True, False, False, Image.Transpose.TRANSPOSE),
    6: _Turn(True, True, False, Image.Transpose.ROTATE_270),
    7: _Turn(True, True, True, Image.Transpose.TRANSVERSE),
    8: _Turn(True, False, True, Image.Transpose.ROTATE_90),
}


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, or none that can be read.

    An orientation that only XMP states does not count: fast JPEG decoders and browsers do not read it, and person
    boxes found in one orientation would then be cut out of another.
    """
    return parse_orientation(image.info.get("exif"))


def parse_orientation(exif: bytes | None) -> int:
    """The orientation that EXIF data state, 1 to 8; 1 if they state none, or cannot be read."""
    if not exif:
        return 1
    parser = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.load(exif)
            found = int(parser.get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's parser raises many types; unreadable EXIF counts as none
        return 1
    return found if found in _TURNS else 1


def swaps_sides(orientation: int) -> bool:
    """Whether an EXIF orientation swaps width and height."""
    return orientation in _TURNS and _TURNS[orientation].swaps_sides


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Width and height of the upright picture."""
    return (height, width) if swaps_sides(orientation) else (width, height)


def turn_upright(image: Image.Image) -> Image.Image:
    """Turns a picture as its EXIF orientation requires; a turned one has no EXIF any more."""
    turn = _TURNS.get(read_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn.transpose)
    turned.info.pop("exif", None)
    return turned


def turn_array(stored_HW3: np.ndarray, orientation: int) -> np.ndarray:
    """Turns stored pixels as an EXIF orientation requires; returns a view."""
    turn = _TURNS.get(orientation)
    if turn is None:
        return stored_HW3
    turned = stored_HW3.transpose(1, 0, 2) if turn.swaps_sides else stored_HW3
    return turned[:: -1 if turn.mirrors_y else 1, :: -1 if turn.mirrors_x else 1]


def turn_box(box: Box, orientation: int) -> Box:
    """A box of the stored picture as one of the upright picture; `orientation` is EXIF's, 1 to 8."""
    turn = _TURNS.get(orientation)
    if turn is None:
        return box
    xs, ys = (box[0], box[2]), (box[1], box[3])
    if turn.swaps_sides:
        xs, ys = ys, xs
    if turn.mirrors_x:
        xs = (1 - xs[1], 1 - xs[0])
    if turn.mirrors_y:
        ys = (1 - ys[1], 1 - ys[0])
    return xs[0], ys[0], xs[1], ys[1]
