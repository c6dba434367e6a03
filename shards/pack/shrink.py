"""Shrinks pictures (`--max-side`, `--min-side`), and converts those that shards do not store as they are."""

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from shards.format.sample import EXTENSIONS
from shards.pictures.decode import count_frames, load_whole, open_picture, reduce_jpeg
from shards.pictures.orientation import read_orientation, turn_upright, upright_size
from shards.pictures.pixels import has_alpha, to_rgb

MAX_WEBP_SIDE = 16_383
LOSSLESS_WEBP: dict[str, Any] = {"lossless": True, "quality": 0, "method": 0, "exact": True}
"""The fastest lossless effort: on photos 25 % smaller than PNG, and written in a sixth of its time."""


@dataclass(frozen=True)
class Shrink:
    """Limits for the size of stored pictures. Pictures within the limits are stored unchanged, byte for byte."""

    max_side: int | None = None
    """Largest allowed longer side, pixels."""
    min_side: int | None = None
    """Largest allowed shorter side, pixels: enough for a loader that crops squares."""
    quality: int = 90
    """Quality of JPEG and WebP, 1 to 100."""

    def scale(self, width: int, height: int) -> float:
        """The factor for both sides; 1 for a picture within the limits."""
        limits = [(self.max_side, max(width, height)), (self.min_side, min(width, height))]
        return min([1.0, *(limit / side for limit, side in limits if limit is not None)])


class Reencoded(NamedTuple):
    """A picture that was encoded again."""

    data: bytes
    extension: str
    rgb_HW3: np.ndarray
    """Its pixels, uint8, on white."""
    frames: int
    """The number of pictures in the original, of which this is the first."""


def reencode(data: bytes, scale: float = 1.0, quality: int = 90) -> Reencoded:
    """Encodes a picture again, upright and without EXIF, shrunk by `scale` (at most 1).

    JPEG, PNG and WebP keep their format; all others become lossless WebP, or PNG if a side is too long for WebP.
    Transparency stays; CMYK, 16-bit and floating-point pictures become 8-bit RGB. The filter is Lanczos; a JPEG is
    first decoded at a half or less if that leaves at least twice the pixels needed.

    Raises:
        BadPicture: if it cannot be decoded.
    """
    with open_picture(data) as image:
        icc, frames = image.info.get("icc_profile"), count_frames(image, data)
        if EXTENSIONS.get(image.format or "") == "jpg":
            form = "JPEG"
            width, height = image.size
            least = (max(1, int(2 * scale * width)), max(1, int(2 * scale * height)))
            reduction = next((r for r in (8, 4, 2) if r <= min(width // least[0], height // least[1])), 1)
            picture = Image.fromarray(reduce_jpeg(data, reduction))
            width, height = upright_size(width, height, read_orientation(image))
            picture.info = {k: v for k, v in image.info.items() if k == "comment"}  # Pillow writes it again
        else:
            form = str(image.format)
            picture = turn_upright(load_whole(image, data))
            picture = picture.convert("RGBA") if has_alpha(picture) else to_rgb(picture)
            width, height = picture.size
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        if scale < 1:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        options: dict[str, Any] = {"quality": quality}
        if form not in EXTENSIONS:
            form = "WEBP" if max(picture.size) <= MAX_WEBP_SIDE else "PNG"
            options = LOSSLESS_WEBP
        if form == "PNG":
            options = {}
        if not _is_rgb_profile(icc):
            picture.info.pop("icc_profile", None)  # otherwise a PNG would keep it
        elif picture.mode == "RGB":
            options = {**options, "icc_profile": icc}
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
    return Reencoded(buffer.getvalue(), EXTENSIONS[form], np.asarray(to_rgb(picture)), frames)


def _is_rgb_profile(icc: bytes | None) -> bool:
    """Whether a colour profile is for RGB; the profile of a CMYK or grey picture does not fit the result."""
    return icc is not None and icc[16:20] == b"RGB "  # ICC.1:2022, 7.2.6: the data colour space
