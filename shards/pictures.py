"""Decoding and checking pictures with Pillow, for everything that happens before training."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from shards.format.sample import EXTENSIONS

MAX_PIXELS = 178_956_970
"""Larger pictures are refused as decompression bombs (Pillow's own limit, 1 GiB as 16-bit RGB)."""

# EXIF orientation -> what makes the stored picture upright (EXIF 2.3, tag 0x0112).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadPicture(ValueError):
    """A picture that cannot be used; the first argument is the reason as `rejected.parquet` names it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Decoded:
    """A picture that was looked at."""

    extension: str
    width: int
    """Pixels, of the upright picture."""
    height: int
    rgb_HW3: np.ndarray | None = None
    """uint8, upright, on white where it was transparent; smaller than the picture where the caller allowed it.
    None where nobody asked for pixels."""


def inspect(data: bytes, *, check: str = "decode", pixels_side: int | None = None) -> Decoded:
    """Checks a picture, and decodes it where its pixels are wanted.

    `check` "decode" reads all of its compressed data (a header check alone accepts half a file); a JPEG is then
    decoded at an eighth of its size where no pixels are wanted: that goes through every bit of its entropy-coded
    data, which is where damage shows, and leaves out most of the arithmetic. "header" trusts the header.
    `pixels_side` asks for pixels; a JPEG may then come at a half, a quarter or an eighth, with no side below it.

    Raises:
        BadPicture: reasons `empty`, `format`, `too_large` or `corrupt`.
    """
    if not data:
        raise BadPicture("empty", "no bytes")
    if check == "header" and pixels_side is None and (size := _jpeg_size(data)) is not None:
        return Decoded("jpg", *size)
    with opened(data) as image:
        width, height = image.size
        extension = EXTENSIONS[image.format or ""]
        rgb = None
        if check != "header" or pixels_side is not None:
            if extension == "jpg":
                image.draft(None, (pixels_side or 1, pixels_side or 1))
            image.load()
            if pixels_side is not None:
                rgb = np.asarray(on_background(upright(image), (255, 255, 255)))
        if is_turned(image):
            width, height = height, width
    return Decoded(extension, width, height, rgb)


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """A picture of a format and size that can be packed; what Pillow raises inside becomes `BadPicture`, and what it
    warns of (odd metadata, large pictures) is nothing that the user should mend.

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
        except Exception as error:  # Pillow's decoders raise many types on damaged data
            raise BadPicture("corrupt", explain(error)) from None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a plain JPEG, which Pillow takes ten times as long to find. None where Pillow should look:
    other formats, rare kinds of JPEG, anything with EXIF or XMP, nothing but a header, too many pixels."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            is_whole = width and height and at + 2 + length < len(data)
            return (width, height) if is_whole and width * height <= MAX_PIXELS else None
        if not (0xE0 <= marker <= 0xEF or marker in (0xDB, 0xC4, 0xFE, 0xDD)) or marker == 0xE1:
            return None
        at += 2 + length
    return None


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it says nothing, or nothing that can be read.

    An orientation that only XMP states does not count: fast JPEG decoders (and browsers) do not read it, and person
    boxes found in one orientation would then be cut out of another.
    """
    if not (data := image.info.get("exif")):
        return 1
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif.load(data)
            found = int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's parser raises many types; what it cannot read says nothing
        return 1
    return found if found in _TURNS else 1


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF's orientation swaps width and height."""
    return orientation(image) in (5, 6, 7, 8)


def decode(data: bytes) -> np.ndarray:
    """The whole picture as H×W×3 uint8 RGB, upright, on white where it was transparent.

    Raises:
        BadPicture: as `inspect` does.
    """
    rgb = inspect(data, pixels_side=MAX_PIXELS).rgb_HW3
    assert rgb is not None
    return rgb


def explain(error: Exception) -> str:
    """Why Pillow could not decode, in the same words in every process (Pillow names an object's address)."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format"
    return f"{type(error).__name__}: {error}"


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says, then without it."""
    turn = _TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info.pop("exif", None)
    return turned


def on_background(image: Image.Image, rgb: tuple[int, int, int]) -> Image.Image:
    """The picture as 8-bit RGB, with `rgb` behind its transparent pixels."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    base = Image.new("RGB", rgba.size, rgb)
    base.paste(rgba, mask=rgba.getchannel("A"))
    return base


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would cut all above 255 off to white."""
    values_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = Image.fromarray(((values_HW * 255 + 32767) // 65535).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey
