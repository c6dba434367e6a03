"""Decoding and checking pictures with Pillow, for everything that happens before training."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from shards.format import EXTENSIONS

MAX_PIXELS = 178_956_970
"""Larger pictures are refused as decompression bombs (Pillow's own limit, 1 GiB as 16-bit RGB)."""


class BadPicture(ValueError):
    """A picture that cannot be used; the first argument is the reason as `rejected.parquet` names it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Decoded:
    """A fully decoded picture."""

    rgb_HW3: np.ndarray
    """uint8, upright, on white where it was transparent."""
    extension: str


def decode(data: bytes) -> Decoded:
    """Decodes every pixel (a header check alone accepts half a file).

    Raises:
        BadPicture: reasons `empty`, `format`, `too_large` or `corrupt`.
    """
    if not data:
        raise BadPicture("empty", "no bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in EXTENSIONS:
                raise BadPicture("format", f"{image.format} is not one of {', '.join(EXTENSIONS)}")
            extension = EXTENSIONS[image.format]
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture("too_large", f"{image.width} x {image.height} pixels, limit {MAX_PIXELS}")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture("too_large", str(error)) from None
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise BadPicture("corrupt", f"{type(error).__name__}: {error}") from None
    return Decoded(np.asarray(on_background(upright, (255, 255, 255))), extension)


def on_background(image: Image.Image, rgb: tuple[int, int, int]) -> Image.Image:
    """The picture as RGB, with `rgb` behind its transparent pixels."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    base = Image.new("RGB", rgba.size, rgb)
    base.paste(rgba, mask=rgba.getchannel("A"))
    return base
