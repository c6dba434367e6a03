"""Decoding and checking of encoded pictures, for packing, verification, training, evaluation and inference alike.

All of them accept the same formats (`formats.py`), turn pictures by the same rules (`orientation.py`), refuse
the same incomplete files (`jpeg.py`, `containers.py`) and get the same pixels (`pixels.py`).
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.pictures.containers import count_gif_frames, find_cut, has_png_rows, read_png_chunk
from shards.pictures.formats import HEAD_BYTES, MAX_PIXELS, BadPicture, identify_format
from shards.pictures.jpeg import JpegHeader, check_jpeg, decode_jpeg, is_jpeg, read_jpeg_header
from shards.pictures.orientation import read_orientation, turn_array, turn_upright, upright_size
from shards.pictures.pixels import WHITE, Rgb, load_eight_bits, to_rgb
from shards.pictures.tiff import silence_libtiff

logging.getLogger("PIL").addHandler(logging.NullHandler())  # callers get the reason; no lines on stderr
_TIFF_SUBFILE, _TIFF_SUB_IFDS, _DNG_VERSION = 254, 330, 50706


@dataclass(frozen=True)
class Picture:
    """A checked picture."""

    format: str
    """Pillow's name of the format; JPEG also for MPO."""
    width: int
    """Pixels, of the upright picture."""
    height: int
    rgb_HW3: np.ndarray | None = None
    """uint8, upright, with white behind transparent pixels; smaller than the picture if the caller allowed it. None
    unless the caller requested pixels."""


# ---- checking


def check_picture(data: bytes, *, check: str = "decode", pixels_side: int | None = None) -> Picture:
    """Checks an encoded picture, and decodes it if the caller needs pixels.

    Args:
        check: "decode" reads all compressed data, because a check of the header accepts half a file. Without
            `pixels_side` a JPEG is then decoded at an eighth of its size: this reads its entropy-coded data to the
            end, which is where damage shows, and skips most of the arithmetic. "header" trusts the header.
        pixels_side: return pixels; a JPEG may come at a half, a quarter or an eighth, with no side below this.

    Raises:
        BadPicture: reasons `empty`, `format`, `too_large` or `corrupt`.
    """
    if is_jpeg(data):
        header, rgb = _read_jpeg_header(data), None
        if pixels_side is not None:
            rgb = reduce_jpeg(data, _reduction(header.width, header.height, pixels_side))
        elif check != "header":
            _check_jpeg(data, header)
        return Picture("JPEG", *upright_size(header.width, header.height, header.orientation), rgb)
    with open_picture(data) as image:
        assert image.format is not None
        form, size, orientation = image.format, image.size, read_orientation(image)
        rgb = None
        if check != "header" or pixels_side is not None:
            loaded = load_whole(image, data)
            if pixels_side is not None:
                rgb = read_upright_pixels(loaded)
        return Picture(form, *upright_size(*size, orientation), rgb)


def _reduction(width: int, height: int, side: int) -> int:
    """The largest of 8, 4, 2 and 1 that leaves both sides of a JPEG at `side` or more."""
    most = min(width, height) // max(side, 1)
    return next((scale for scale in (8, 4, 2) if scale <= most), 1)


def _check_jpeg(data: bytes, header: JpegHeader) -> None:
    _refuse_cut_mpo(data, header)
    if not check_jpeg(data, header):
        _decode_by_pillow(data, 8)


def _refuse_cut_mpo(data: bytes, header: JpegHeader) -> None:
    if header.has_more:
        with open_picture(data) as image:
            _refuse_cut(data, image)


# ---- decoding


def decode_picture(data: bytes, background: Rgb = WHITE) -> np.ndarray:
    """The whole picture as H×W×3 uint8 RGB, upright, with `background` behind transparent pixels.

    Raises:
        BadPicture: as `check_picture` does.
    """
    return decode_scaled(data, background, 1)[0]


def decode_scaled(data: bytes, background: Rgb, scale: int) -> tuple[np.ndarray, int]:
    """Like `decode_picture`, with the scale of the result: a JPEG may come at 1/`scale` of its sides, rounded up. Its
    higher frequencies are then never transformed. All other pictures are returned in full size, at scale 1.

    Raises:
        BadPicture: as `check_picture` does.
    """
    if not is_jpeg(data):
        with open_picture(data) as image:
            return read_upright_pixels(load_whole(image, data), background), 1
    header = _read_jpeg_header(data)
    if header.orientation == 1 and scale > 1:
        return _decode_jpeg(data, header, scale), scale
    return np.ascontiguousarray(turn_array(_decode_jpeg(data, header, 1), header.orientation)), 1


def reduce_jpeg(data: bytes, reduction: int) -> np.ndarray:
    """A JPEG at 1/`reduction` (1, 2, 4 or 8) of its sides, rounded up: H×W×3 uint8, upright.

    Raises:
        BadPicture: as `check_picture` does.
    """
    header = _read_jpeg_header(data)
    return turn_array(_decode_jpeg(data, header, reduction), header.orientation)


def _decode_jpeg(data: bytes, header: JpegHeader, scale: int) -> np.ndarray:
    """The stored pixels of a whole JPEG as RGB, at 1/`scale` of its sides."""
    if header.channels == 4:
        _check_jpeg(data, header)
        return _decode_by_pillow(data, scale)
    _refuse_cut_mpo(data, header)
    stored = decode_jpeg(data, scale)
    return _decode_by_pillow(data, scale) if stored is None else stored


def _decode_by_pillow(data: bytes, scale: int) -> np.ndarray:
    """Decodes a JPEG that libjpeg-turbo's interface cannot; CMYK as Pillow shows it, for example."""
    with open_picture(data) as image:
        if scale > 1:
            image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))
        return np.array(to_rgb(image))


def _read_jpeg_header(data: bytes) -> JpegHeader:
    if (header := read_jpeg_header(data)) is not None:
        return header
    with open_picture(data) as image:
        has_more = image.format == "MPO"
        return JpegHeader(*image.size, read_orientation(image), len(image.getbands()), has_more)


# ---- Pillow


@contextmanager
def open_picture(data: bytes) -> Iterator[Image.Image]:
    """Opens a picture whose format and size are accepted. Hides Pillow's warnings (odd metadata, large pictures), and
    turns every error that Pillow raises inside into `BadPicture`.

    Raises:
        BadPicture: reasons `empty`, `format`, `too_large` or `corrupt`.
    """
    if not data:
        raise BadPicture("empty", "no bytes")
    found = identify_format(data[:HEAD_BYTES])
    if found is None:
        raise BadPicture("corrupt", "not a picture of a known format")
    if found.refusal is not None:
        raise BadPicture("format", found.refusal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=_plugins(found.name)) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height}"
                    raise BadPicture("too_large", f"{size} pixels, limit {MAX_PIXELS}")
                _refuse_camera_raw(image)
                if image.format == "PNG" and (exif := read_png_chunk(data, b"eXIf")):
                    image.info["exif"] = b"Exif\0\0" + exif  # Pillow finds one behind the pixels only later
                yield image
        except BadPicture:
            raise
        except Image.DecompressionBombError as error:
            raise BadPicture("too_large", str(error)) from None
        except (
            UnidentifiedImageError
        ):  # its message holds an object's address, which differs between processes
            raise BadPicture("corrupt", f"not a readable {found.name} picture") from None
        except Exception as error:  # Pillow's decoders raise many types on damaged data
            raise BadPicture("corrupt", " ".join(f"{type(error).__name__}: {error}".split())) from None


@lru_cache
def _plugins(name: str) -> tuple[str, ...]:
    """Pillow's plugins for a format, which use one thread: packing and loading run one process for each core."""
    if name == "HEIF":
        import pillow_heif

        pillow_heif.options.DECODE_THREADS = 1
        pillow_heif.register_heif_opener()
    elif name == "AVIF":
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    elif name == "TIFF":
        silence_libtiff()
    return ("JPEG", "MPO") if name == "JPEG" else (name,)


def _refuse_camera_raw(image: Any) -> None:
    """Raises BadPicture for the raw files of cameras that are TIFFs, whose first picture is a small preview."""
    if image.format == "TIFF":
        tags = image.tag_v2
        is_preview = tags.get(_TIFF_SUBFILE, 0) & 1 and _TIFF_SUB_IFDS in tags
        if is_preview or _DNG_VERSION in tags:
            raise BadPicture(
                "format", "raw pictures of cameras are not decoded; convert them to PNG, JPEG or WebP"
            )


def load_whole(image: Image.Image, data: bytes) -> Image.Image:
    """Loads an open picture with 8 bits per sample, as stored; `data` are its bytes.

    Raises:
        BadPicture: reason `corrupt`, if a part of the file is missing; `format`, for values that are no colours.
    """
    _refuse_cut(data, image)
    loaded = load_eight_bits(image)
    if image.format == "PNG":
        last_row = loaded.crop((0, loaded.height - 1, loaded.width, loaded.height))
        if not np.asarray(last_row).any() and not has_png_rows(data):
            raise BadPicture("corrupt", "the PNG is truncated: its compressed data end before the last row")
    return loaded


def _refuse_cut(data: bytes, image: Image.Image) -> None:
    if problem := find_cut(data, image):
        raise BadPicture("corrupt", problem)


def count_frames(image: Image.Image, data: bytes) -> int:
    """The number of pictures in an open file: of an animation, or of pages."""
    return count_gif_frames(data) if image.format == "GIF" else int(getattr(image, "n_frames", 1))


def read_upright_pixels(image: Image.Image, background: Rgb = WHITE) -> np.ndarray:
    """An open picture as H×W×3 uint8 RGB, upright, with `background` behind transparent pixels."""
    return np.array(to_rgb(turn_upright(load_eight_bits(image)), background))
