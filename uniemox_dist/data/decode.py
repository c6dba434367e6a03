"""Fast decoding for training: uint8 RGB, upright; a JPEG comes at a half, a quarter or an eighth if that is enough.

`shards/pictures.py` holds the rules (formats, EXIF orientation, transparency). A JPEG is decoded here by libjpeg-turbo,
which gives the same pixels faster; every other picture, and every JPEG that libjpeg-turbo refuses, is decoded there.
"""

import numpy as np
import simplejpeg

from shards.pictures import (
    WHITE,
    BadPicture,
    Rgb,
    decode_picture,
    is_jpeg,
    read_jpeg_orientation,
    turn_array,
)


def decode_rgb(data: bytes, background: Rgb = WHITE, scale: int = 1) -> tuple[np.ndarray, int]:
    """The picture as H×W×3 uint8, upright, with `background` behind transparent pixels, and the scale of the result.

    A JPEG may come at 1/`scale` of its sides, rounded up: its higher frequencies are then never transformed.
    All other pictures are returned in full size, at scale 1.

    Raises:
        ValueError: if it cannot be decoded.
    """
    if is_jpeg(data):
        try:
            return _decode_jpeg(data, scale)
        except ValueError:  # unusual JPEGs, such as CMYK; and damaged ones, about which Pillow decides
            pass
    try:
        return np.array(decode_picture(data, background)), 1
    except BadPicture as bad:
        raise ValueError(f"cannot be decoded: {bad.detail}") from None


def _decode_jpeg(data: bytes, scale: int) -> tuple[np.ndarray, int]:
    orientation = read_jpeg_orientation(data)
    if orientation != 1:
        return np.ascontiguousarray(turn_array(simplejpeg.decode_jpeg(data), orientation)), 1
    if scale == 1:
        return simplejpeg.decode_jpeg(data), 1
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    least = {"min_height": -(-height // scale), "min_width": -(-width // scale), "min_factor": scale}
    return simplejpeg.decode_jpeg(data, **least), scale
