"""Smaller pictures for smaller shards: what `--max-side` and `--min-side` do."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from shards.format.sample import EXTENSIONS
from shards.pictures import has_alpha, open_picture, read_orientation, swaps_sides, to_rgb, turn_upright


@dataclass(frozen=True)
class Shrink:
    """How large a stored picture may be; pictures within the limits pass through byte for byte."""

    max_side: int | None = None
    """Pixels of the longer side, at most."""
    min_side: int | None = None
    """Pixels of the shorter side, at most: what a loader that crops squares needs."""
    quality: int = 90
    """Of JPEG and WebP, 1 to 100."""

    def scale(self, width: int, height: int) -> float:
        """By what the sides are multiplied: 1 where the picture is within the limits."""
        limits = [(self.max_side, max(width, height)), (self.min_side, min(width, height))]
        return min([1.0, *(limit / side for limit, side in limits if limit is not None)])


def shrink(data: bytes, scale: float, quality: int) -> tuple[bytes, np.ndarray]:
    """A picture at `scale` (below 1) in its own format, upright, without EXIF; and its pixels, H×W×3 on white.

    Transparency stays; CMYK and 16-bit grey become 8-bit RGB. Lanczos, from a JPEG decoded at a half or less where
    that leaves at least twice the pixels needed.

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
        if not _is_of_rgb(icc):
            picture.info.pop("icc_profile", None)  # from where a PNG would take it
        elif picture.mode == "RGB":
            options["icc_profile"] = icc
        if form != "PNG":
            options["quality"] = quality
        picture.save(buffer, form, **options)
    return buffer.getvalue(), np.asarray(to_rgb(picture))


def _is_of_rgb(icc: bytes | None) -> bool:
    """Whether a profile says what RGB values mean: that of a CMYK or grey picture describes nothing any more."""
    return icc is not None and icc[16:20] == b"RGB "  # ICC.1:2022, 7.2.6: the data colour space
