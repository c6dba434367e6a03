"""Shrinks pictures (`--max-side`, `--min-side`)."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from shards.format.sample import EXTENSIONS
from shards.pictures import has_alpha, open_picture, read_orientation, swaps_sides, to_rgb, turn_upright


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


def shrink(data: bytes, scale: float, quality: int) -> tuple[bytes, np.ndarray]:
    """Shrinks a picture by `scale` (below 1); returns its bytes and its pixels (H×W×3 uint8, on white).

    The format stays. The result is upright and has no EXIF. Transparency stays; CMYK and 16-bit grey become 8-bit RGB.
    The filter is Lanczos; a JPEG is first decoded at a half or less if that leaves at least twice the pixels needed.

    Raises:
        BadPicture: if it cannot be decoded.
    """
    with open_picture(data) as image:
        form = "JPEG" if EXTENSIONS[image.format or ""] == "jpg" else str(image.format)
        width, height = image.size
        icc = image.info.get("icc_profile")
        if form == "JPEG":
            image.draft(None, (max(1, int(2 * scale * width)), max(1, int(2 * scale * height))))
        image.load()
        picture = turn_upright(image)
        if swaps_sides(read_orientation(image)):
            width, height = height, width
        keeps_alpha = form != "JPEG" and has_alpha(picture)
        picture = picture.convert("RGBA") if keeps_alpha else to_rgb(picture)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        options: dict[str, Any] = {}
        if not _is_rgb_profile(icc):
            picture.info.pop("icc_profile", None)  # otherwise a PNG would keep it
        elif picture.mode == "RGB":
            options["icc_profile"] = icc
        if form != "PNG":
            options["quality"] = quality
        picture.save(buffer, form, **options)
    return buffer.getvalue(), np.asarray(to_rgb(picture))


def _is_rgb_profile(icc: bytes | None) -> bool:
    """Whether a colour profile is for RGB; the profile of a CMYK or grey picture does not fit the result."""
    return icc is not None and icc[16:20] == b"RGB "  # ICC.1:2022, 7.2.6: the data colour space
