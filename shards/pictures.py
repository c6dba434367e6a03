"""Decoding and checking of encoded pictures: the only place that knows formats, EXIF, transparency and completeness.

Packing, verification, training, embedding, prediction and evaluation all decode through this module. Training adds a
faster JPEG decoder on top (`uniemox_dist/data/decode.py`), which follows the same rules.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from shards.format.sample import EXTENSIONS

MAX_PIXELS = 178_956_970
"""Pictures with more pixels are refused as decompression bombs (Pillow's own limit, 1 GiB as 16-bit RGB)."""
Rgb = tuple[int, int, int]
WHITE: Rgb = (255, 255, 255)
Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 as fractions of width and height."""


class BadPicture(ValueError):
    """A picture that cannot be used.

    `reason` is the word that `rejected.parquet` lists: `empty`, `format`, `too_large`, `corrupt` or `unreadable`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Picture:
    """A checked picture."""

    extension: str
    width: int
    """Pixels, of the upright picture."""
    height: int
    rgb_HW3: np.ndarray | None = None
    """uint8, upright, with white behind transparent pixels; smaller than the picture if the caller allowed it. None
    unless the caller requested pixels."""


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


# ---- checking and decoding


def check_picture(data: bytes, *, check: str = "decode", pixels_side: int | None = None) -> Picture:
    """Checks an encoded picture, and decodes it if the caller needs pixels.

    Args:
        check: "decode" reads all compressed data, because a check of the header accepts half a file. Without
            `pixels_side` a JPEG is then decoded at an eighth of its size: this reads its entropy-coded data to the
            end, which is where damage shows, and skips most of the arithmetic. "header" trusts the header.
        pixels_side: return pixels; a JPEG may come at a half, a quarter or an eighth, with no side below this.

    Raises:
        BadPicture: reasons `empty`, `format`, `too_large` or `corrupt`.
    """
    if not data:
        raise BadPicture("empty", "no bytes")
    if check == "header" and pixels_side is None and (header := read_jpeg_header(data)) is not None:
        return Picture("jpg", *_upright_size(header.width, header.height, header.orientation))
    with open_picture(data) as image:
        width, height = image.size
        extension = EXTENSIONS[image.format or ""]
        rgb = None
        if check != "header" or pixels_side is not None:
            if extension == "jpg":
                image.draft(None, (pixels_side or 1, pixels_side or 1))
            image.load()
            if pixels_side is not None:
                rgb = read_upright_pixels(image)
        return Picture(extension, *_upright_size(width, height, read_orientation(image)), rgb)


def decode_picture(data: bytes, background: Rgb = WHITE) -> np.ndarray:
    """The whole picture as H×W×3 uint8 RGB (read-only), upright, with `background` behind transparent pixels.

    Raises:
        BadPicture: as `check_picture` does.
    """
    if not data:
        raise BadPicture("empty", "no bytes")
    with open_picture(data) as image:
        image.load()
        return read_upright_pixels(image, background)


@contextmanager
def open_picture(data: bytes) -> Iterator[Image.Image]:
    """Opens a picture whose format and size are accepted. Hides Pillow's warnings (odd metadata, large pictures), and
    turns every error that Pillow raises inside into `BadPicture`.

    Raises:
        BadPicture: reasons `format`, `too_large` or `corrupt`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.format not in EXTENSIONS:
                    raise BadPicture("format", f"{image.format} is not one of {', '.join(EXTENSIONS)}")
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height}"
                    raise BadPicture("too_large", f"{size} pixels, limit {MAX_PIXELS}")
                yield image
        except BadPicture:
            raise
        except Image.DecompressionBombError as error:
            raise BadPicture("too_large", str(error)) from None
        except (
            UnidentifiedImageError
        ):  # its message holds an object's address, which differs between processes
            raise BadPicture("corrupt", "not a picture of a known format") from None
        except Exception as error:  # Pillow's decoders raise many types on damaged data
            raise BadPicture("corrupt", f"{type(error).__name__}: {error}") from None


def read_upright_pixels(image: Image.Image, background: Rgb = WHITE) -> np.ndarray:
    """An open picture as H×W×3 uint8 RGB (read-only), upright, with `background` behind transparent pixels."""
    return np.asarray(to_rgb(turn_upright(image), background))


# ---- transparency and depth


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture may have transparent pixels."""
    return "A" in image.getbands() or "transparency" in image.info


def to_rgb(image: Image.Image, background: Rgb = WHITE) -> Image.Image:
    """The picture as 8-bit RGB, with `background` behind its transparent pixels."""
    if image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if not has_alpha(image):
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    base = Image.new("RGB", rgba.size, background)
    base.paste(rgba, mask=rgba.getchannel("A"))
    return base


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow's own conversion would clip all values above 255 to white."""
    values_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = Image.fromarray(((values_HW * 255 + 32767) // 65535).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey


# ---- EXIF orientation


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, or none that can be read.

    An orientation that only XMP states does not count: fast JPEG decoders and browsers do not read it, and person
    boxes found in one orientation would then be cut out of another.
    """
    return _parse_orientation(image.info.get("exif"))


def _parse_orientation(exif: bytes | None) -> int:
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


def _upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if swaps_sides(orientation) else (width, height)


# ---- JPEG headers


class JpegHeader(NamedTuple):
    """The header of a JPEG."""

    width: int
    """Pixels as stored."""
    height: int
    orientation: int
    """The EXIF orientation, 1 to 8."""


def is_jpeg(data: bytes) -> bool:
    """Whether the bytes are those of a JPEG: it has no transparency, and can be decoded at a smaller size."""
    return data[:2] == b"\xff\xd8"


def read_jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of an encoded JPEG, 1 to 8.

    Raises:
        BadPicture: if its header cannot be read.
    """
    if (header := read_jpeg_header(data)) is not None:
        return header.orientation
    with open_picture(data) as image:
        return read_orientation(image)


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Reads the segments of a common JPEG in a tenth of Pillow's time.

    None if Pillow has to decide: other formats, rare kinds of JPEG, bytes between segments, a header that is cut off,
    or too many pixels. Fill bytes before a marker are skipped, as Pillow does (ITU-T T.81, B.1.1.2).
    """
    if not is_jpeg(data):
        return None
    at, size, exif = 2, (0, 0), b""
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xDA:  # the first scan ends the header
            width, height = size
            is_sound = 0 < width * height <= MAX_PIXELS
            return JpegHeader(width, height, _parse_orientation(exif)) if is_sound else None
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = (width, height)
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif += data[at + (10 if exif else 4) : at + 2 + length]  # long EXIF is split over segments
        elif not (0xE0 <= marker <= 0xEF or marker in (0xDB, 0xC4, 0xFE, 0xDD)):
            return None
        at += 2 + length
    return None
