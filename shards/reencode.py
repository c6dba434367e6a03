"""Smaller pictures for smaller shards: what `--max-side` and `--min-side` do."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.format import EXTENSIONS
from shards.pictures import MAX_PIXELS, BadPicture, explain, is_turned, on_background, upright


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
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture("too_large", f"{image.width} x {image.height} pixels, limit {MAX_PIXELS}")
            form = "JPEG" if EXTENSIONS[image.format or ""] == "jpg" else str(image.format)
            width, height = image.size
            icc = image.info.get("icc_profile")
            if form == "JPEG":
                image.draft(None, (max(1, int(2 * scale * width)), max(1, int(2 * scale * height))))
            image.load()
            picture = upright(image)
            if is_turned(image):
                width, height = height, width
            has_alpha = form != "JPEG" and ("A" in picture.getbands() or "transparency" in picture.info)
            picture = picture.convert("RGBA") if has_alpha else on_background(picture, (255, 255, 255))
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            options = {} if icc is None or picture.mode != "RGB" else {"icc_profile": icc}
            if form != "PNG":
                options["quality"] = quality
            picture.save(buffer, form, **options)
    except BadPicture:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise BadPicture("corrupt", explain(error)) from None
    return buffer.getvalue(), np.asarray(on_background(picture, (255, 255, 255)))
