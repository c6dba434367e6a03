"""Small pictures of every accepted format, and parts of files that no encoder here writes."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

PHOTO = Image.fromarray(data.astronaut()).resize((96, 64))


def encoded(form: str, picture: Image.Image = PHOTO, **options: Any) -> bytes:
    """A picture in one of Pillow's formats; `also` lists further frames or pages."""
    buffer = io.BytesIO()
    also = options.pop("also", None)
    more = {} if also is None else {"save_all": True, "append_images": [frame.copy() for frame in also]}
    picture.copy().save(buffer, form, **more, **options)  # some encoders change the picture's own settings
    return buffer.getvalue()


def _variants() -> dict[str, bytes]:
    grey, palette, turned = (
        PHOTO.convert("L"),
        PHOTO.quantize(64),
        [PHOTO.transpose(Image.Transpose.ROTATE_180)],
    )
    clear = PHOTO.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    plain = f"P3\n{PHOTO.width} {PHOTO.height}\n255\n{' '.join(map(str, np.asarray(PHOTO).ravel()))}\n"
    return {
        "jpeg": encoded("JPEG"),
        "jpeg progressive": encoded("JPEG", progressive=True),
        "jpeg grey": encoded("JPEG", grey),
        "jpeg cmyk": encoded("JPEG", PHOTO.convert("CMYK")),
        "jpeg restarts": encoded("JPEG", restart_marker_rows=1),
        "mpo": encoded("MPO", also=turned),
        "png": encoded("PNG"),
        "png palette": encoded("PNG", palette),
        "png 16 bits": encoded("PNG", deep),
        "png grey alpha": encoded("PNG", clear.convert("LA")),
        "apng": encoded("PNG", also=turned),
        "webp": encoded("WEBP"),
        "webp lossless": encoded("WEBP", clear, lossless=True),
        "webp animated": encoded("WEBP", also=turned),
        "gif": encoded("GIF"),
        "gif animated": encoded("GIF", also=turned),
        "bmp": encoded("BMP"),
        "bmp palette": encoded("BMP", palette),
        "tiff": encoded("TIFF"),
        "tiff cmyk": encoded("TIFF", PHOTO.convert("CMYK")),
        "tiff pages": encoded("TIFF", also=turned),
        "tiff 1 bit": encoded("TIFF", PHOTO.convert("1"), compression="group4"),
        "tiff 16 bits": encoded("TIFF", deep),
        "tiff alpha": encoded("TIFF", clear, compression="tiff_adobe_deflate"),
        **{f"tiff {name}": encoded("TIFF", compression=name) for name in ("tiff_lzw", "packbits", "jpeg")},
        "ppm": encoded("PPM"),
        "ppm plain": plain.encode(),
        "pgm": encoded("PPM", grey),
        "pbm": encoded("PPM", PHOTO.convert("1")),
        "jp2": encoded("JPEG2000", clear),
        "j2k": encoded("JPEG2000", no_jp2=True),
        "avif": encoded("AVIF", clear),
        "avif animated": encoded("AVIF", also=turned),
    }


VARIANTS = _variants()
"""Every accepted format but HEIC, in its common forms."""


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png16(values_HWC: np.ndarray, *more: bytes) -> bytes:
    """A 16-bit PNG of 1 (grey), 2 (grey and alpha), 3 or 4 channels; `more` are chunks before its pixels."""
    height, width, channels = values_HWC.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + body
