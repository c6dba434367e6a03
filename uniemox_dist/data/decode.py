"""Encoded pictures to pixels: upright uint8 RGB, a JPEG at a half, a quarter or an eighth where that is enough."""

import io

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from shards.pictures import explain, on_background, upright
from uniemox_dist.data.crops import WHITE, Rgb

# EXIF orientation -> what makes the stored H×W×3 array upright (EXIF 2.3, tag 0x0112).
_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def is_jpeg(data: bytes) -> bool:
    """Whether these are the bytes of a JPEG: it has no transparent pixels and may come smaller."""
    return data[:2] == b"\xff\xd8"


def decode_rgb(data: bytes, background: Rgb = WHITE, scale: int = 1) -> tuple[np.ndarray, int]:
    """The picture as H×W×3 uint8, upright, with `background` behind transparent pixels, and the scale it came at.

    A JPEG may come at 1/`scale` of its sides, rounded up: then its frequencies beyond that are never transformed.
    Everything else comes whole, as scale 1.

    Raises:
        ValueError: if it cannot be decoded.
    """
    if is_jpeg(data):
        try:
            # The fast path for what most pictures are; unusual files (CMYK, …) go the way below.
            return _decode_jpeg(data, scale)
        except ValueError:
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            rgb = on_background(upright(image), background)
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise ValueError(f"cannot be decoded: {explain(error)}") from None
    return np.array(rgb), 1


def _decode_jpeg(data: bytes, scale: int) -> tuple[np.ndarray, int]:
    turn = _UPRIGHT.get(_orientation(data))
    if turn is not None:
        return np.ascontiguousarray(turn(simplejpeg.decode_jpeg(data))), 1
    if scale == 1:
        return simplejpeg.decode_jpeg(data), 1
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    least = {"min_height": -(-height // scale), "min_width": -(-width // scale), "min_factor": scale}
    return simplejpeg.decode_jpeg(data, **least), scale


def _orientation(data: bytes) -> int:
    """EXIF's orientation of a JPEG, 1 where nothing is said: read from the segments before the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = Image.Exif()
            try:
                exif.load(data[at + 4 : at + 2 + length])
                return int(exif.get(ExifTags.Base.Orientation, 1))
            except Exception:  # Pillow's parser raises many types; what it cannot read says nothing
                return 1
        if marker in (0xD9, 0xDA) or length < 2:
            break
        at += 2 + length
    return 1
