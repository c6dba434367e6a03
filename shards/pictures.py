"""Decoding and checking pictures with Pillow, for everything that happens before training."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

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
            rgb = on_background(upright(image), (255, 255, 255))
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture("too_large", str(error)) from None
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise BadPicture("corrupt", explain(error)) from None
    return Decoded(np.asarray(rgb), extension)


def explain(error: Exception) -> str:
    """Why Pillow could not decode, in the same words in every process (Pillow names an object's address)."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format"
    return f"{type(error).__name__}: {error}"


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says.

    Where EXIF says nothing Pillow would believe XMP, which fast JPEG decoders (and browsers) do not read:
    person boxes found in one orientation would then be cut out of another.
    """
    if data := image.info.get("exif"):
        exif = Image.Exif()
        exif.load(data)
        if ExifTags.Base.Orientation not in exif:
            return image
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)
    return ImageOps.exif_transpose(image)


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
