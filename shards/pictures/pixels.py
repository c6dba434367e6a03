"""Samples of pictures as 8-bit colours: depth, transparency, and what cannot be shown.

Samples of 16 bits are scaled by their own depth, because cameras and scanners store 10, 12 or 14 bits in 16. The depth
is what the file states (see `_stated_bits`), or else the smallest of 8, 10, 12, 14 and 16 bits that holds the largest
value of the picture.
"""

import io
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from shards.pictures.containers import read_png_chunk
from shards.pictures.formats import BadPicture
from shards.pictures.tiff import has_wide_planes, read_planes

Rgb = tuple[int, int, int]
WHITE: Rgb = (255, 255, 255)
_DEPTHS = (8, 10, 12, 14, 16)
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_LARGEST, _TIFF_EXTRA = 258, 262, 281, 338
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""Byte order of a raw mode -> the order under which Pillow reads the other byte of every sample."""


# ---- transparency


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture may have transparent pixels."""
    return any(band in ("A", "a") for band in image.getbands()) or "transparency" in image.info


def to_rgb(image: Image.Image, background: Rgb = WHITE) -> Image.Image:
    """The picture as 8-bit RGB, with `background` behind its transparent pixels.

    Raises:
        BadPicture: reason `format`, for values that are no colours.
    """
    image = load_eight_bits(image)
    if not has_alpha(image):
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    base = Image.new("RGB", rgba.size, background)
    base.paste(rgba, mask=rgba.getchannel("A"))
    return base


# ---- depth


def load_eight_bits(image: Image.Image) -> Image.Image:
    """Loads a picture, with 8 bits per sample. The result may still have a palette, transparency or CMYK colours.

    Raises:
        BadPicture: reason `format`, for values that are no colours.
    """
    if (loaded := _load_sixteen_bit_colours(image) or _load_sixteen_bit_ppm(image)) is not None:
        return loaded
    bits = _stated_bits(image) if image.mode.startswith("I;16") else None
    inverted = _is_white_zero(image)
    is_scaled = _is_scaled_by_pillow(image)
    image.load()
    if image.mode in ("LAB", "HSV"):
        raise BadPicture("format", f"{image.mode} colours are not decoded; convert it to RGB")
    if image.mode == "F":
        return _grey(image, _float_shares(np.asarray(image)), inverted)
    if not image.mode.startswith("I"):
        return image
    values_HW = np.asarray(image).astype(np.int64)
    if values_HW.min() < 0 or values_HW.max() > 65535:
        raise BadPicture(
            "format", "values below 0 or above 65,535 are no colours; convert it to 8 or 16 bits"
        )
    largest = 65535 if is_scaled else _full_scale(int(values_HW.max()), bits)
    grey = _grey(image, _scale(values_HW, largest), inverted)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey


def _grey(image: Image.Image, grey_HW: np.ndarray, inverted: bool) -> Image.Image:
    result = Image.fromarray(255 - grey_HW if inverted else grey_HW)
    result.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return result


def _float_shares(values_HW: np.ndarray) -> np.ndarray:
    """Floating-point samples from 0 to 1 as 8 bits."""
    lowest, largest = float(values_HW.min()), float(values_HW.max())  # NaN if there is one
    if not (lowest >= 0 and largest <= 1):
        raise BadPicture(
            "format",
            f"floating-point values from {lowest:g} to {largest:g}, wanted 0 to 1; convert it to 8 or 16 bits",
        )
    return np.asarray((values_HW * 255 + 0.5).astype(np.uint8))


def _full_scale(largest: int, stated_bits: int | None) -> int:
    """The value of white for samples of up to 16 bits.

    PNG's sBIT states how many bits mattered before the writer scaled them up to 16; many writers do not scale.
    """
    if stated_bits is not None:
        return (1 << stated_bits) - 1 if largest < 1 << stated_bits else 65535
    return next((1 << bits) - 1 for bits in _DEPTHS if largest < 1 << bits)


def _scale(values: np.ndarray, full: int) -> np.ndarray:
    return np.asarray(((values.astype(np.int64) * 255 + full // 2) // full).clip(0, 255).astype(np.uint8))


def _stated_bits(image: Image.Image) -> int | None:
    """The number of bits of a sample that matter: of a PNG's sBIT chunk, or of a TIFF's tags BitsPerSample and
    MaxSampleValue. None if the file does not state it."""
    if image.format == "PNG":
        sbit = read_png_chunk(_encoded(image), b"sBIT") or b""
        bits = max(sbit[: 1 if image.mode.startswith("I") else 3], default=0)
        return bits if 1 <= bits <= 16 else None
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if max(tags.get(_TIFF_BITS, (16,))) < 16:
            return int(max(tags[_TIFF_BITS]))
        stated = tags.get(_TIFF_LARGEST, 0)
        largest = max(stated) if isinstance(stated, tuple) else stated
        return int(largest).bit_length() if 255 <= largest <= 65535 else None
    return None


def _is_scaled_by_pillow(image: Image.Image) -> bool:
    """Whether Pillow scales grey values to 16 bits, because the header states fewer."""
    if image.format == "JPEG2000":
        data = _encoded(image)
        size = data.find(b"\xff\x4f\xff\x51")  # the codestream begins with the marker SIZ
        return size >= 0 and (data[size + 42 : size + 43] or b"\x0f")[0] & 127 < 15
    if image.format == "PPM":
        tiles: list[Any] = getattr(image, "tile", [])
        return bool(tiles) and isinstance(tiles[0].args, tuple) and tiles[0].args[-1] != 65535
    return False


def _is_white_zero(image: Image.Image) -> bool:
    """Whether 0 is white in a TIFF; Pillow inverts only samples of up to 8 bits."""
    if image.format != "TIFF" or image.mode not in ("I;16", "F"):
        return False
    return image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0  # type: ignore[attr-defined,no-any-return]


# ---- 16-bit colours


def _load_sixteen_bit_colours(image: Image.Image) -> Image.Image | None:
    """A 16-bit colour picture that is not loaded yet, scaled to 8 bits; None for other pictures.

    Pillow has no 16-bit colours: it reads the upper byte of every sample. Reading the file again under the other byte
    order gives the lower bytes.
    """
    rawmodes = {_rawmode(tile) for tile in getattr(image, "tile", ())}
    has_planes = has_wide_planes(image)
    if image.format not in ("PNG", "TIFF") or not (has_planes or any(";16" in mode for mode in rawmodes)):
        return None
    if image.mode not in ("RGB", "RGBA", "CMYK"):
        return None
    encoded, mode, bits = _encoded(image), image.mode, _stated_bits(image)
    if has_planes:
        return _load_planes(image, encoded, bits)
    is_premultiplied = any(mode.startswith("RGBa;") for mode in rawmodes)
    upper_HWC, info = _load_bytes(encoded, image.format, "RGBA" if rawmodes == {"LA;16B"} else None)
    if rawmodes == {"LA;16B"}:  # as if 8-bit RGBA: the two bytes of grey, then the two of alpha
        bytes_HW4 = upper_HWC.astype(np.uint16)
        grey_HW, alpha_HW = (bytes_HW4[:, :, i] << 8 | bytes_HW4[:, :, i + 1] for i in (0, 2))
        values_HWC = np.stack([grey_HW, grey_HW, grey_HW, alpha_HW], axis=2)
    else:
        lower_HWC, _ = _load_bytes(encoded, image.format, "other byte")
        values_HWC = upper_HWC.astype(np.uint16) << 8 | lower_HWC
    colours = 3 if mode.startswith("RGB") else 4
    if is_premultiplied:
        values_HWC, bits = _divide_by_alpha(values_HWC, bits), 16
    parts = [_scale(part, _full_scale(int(part.max()), bits)) for part in _split(values_HWC, colours)]
    transparent = info.pop("transparency", None)
    if isinstance(transparent, tuple):
        clear_HW = (values_HWC[:, :, :3] == np.array(transparent)).all(axis=2)
        parts.append(np.where(clear_HW, 0, 255).astype(np.uint8)[:, :, None])
        mode = "RGBA"
    loaded = _from_array(np.concatenate(parts, axis=2), mode)
    loaded.info = info
    return loaded


def _load_planes(image: Image.Image, encoded: bytes, bits: int | None) -> Image.Image:
    """A TIFF with separate planes of more than 8 bits, scaled to 8 bits."""
    values_HWC = read_planes(image, encoded)
    channels = len(image.getbands())
    if values_HWC is None or values_HWC.shape[2] < channels:
        raise BadPicture("format", "colours of more than 8 bits in separate planes; convert it to 8 bits")
    values_HWC = values_HWC[:, :, :channels]
    if image.mode == "RGBA" and 1 in image.tag_v2.get(_TIFF_EXTRA, ()):  # type: ignore[attr-defined]
        values_HWC, bits = _divide_by_alpha(values_HWC, bits), 16
    colours = 3 if image.mode.startswith("RGB") else 4
    parts = [_scale(part, _full_scale(int(part.max()), bits)) for part in _split(values_HWC, colours)]
    loaded = _from_array(np.concatenate(parts, axis=2), image.mode)
    loaded.info = dict(image.info)
    return loaded


def _divide_by_alpha(values_HW4: np.ndarray, bits: int | None) -> np.ndarray:
    """Colours that were multiplied by alpha, and alpha, as values of 16 bits. Both have the same depth."""
    full = _full_scale(int(values_HW4.max()), bits)
    values = values_HW4.astype(np.int64)
    alpha_HW1 = values[:, :, 3:]
    colours_HW3 = (values[:, :, :3] * 65535 + alpha_HW1 // 2) // np.maximum(alpha_HW1, 1)
    alpha_HW1 = (alpha_HW1 * 65535 + full // 2) // full
    colours_HW3 = np.where(alpha_HW1 > 0, colours_HW3.clip(0, 65535), 0)
    return np.concatenate([colours_HW3, alpha_HW1], axis=2).astype(np.uint16)


def _load_sixteen_bit_ppm(image: Image.Image) -> Image.Image | None:
    """A binary PPM with colours of 16 bits whose header states the largest value, 65535, which writers state for fewer
    bits, too; None for other pictures. Pillow scales those of other headers."""
    tiles = getattr(image, "tile", ())
    if image.format != "PPM" or image.mode != "RGB" or not tiles:
        return None
    if tiles[0].codec_name != "ppm" or tiles[0].args[-1] != 65535:
        return None
    data, count = _encoded(image)[tiles[0].offset :], image.width * image.height * 3
    if len(data) < 2 * count:
        return None  # Pillow names the problem
    values_HW3 = np.frombuffer(data, ">u2", count).reshape(image.height, image.width, 3)
    loaded = _from_array(_scale(values_HW3, _full_scale(int(values_HW3.max()), None)), "RGB")
    loaded.info = dict(image.info)
    return loaded


def _from_array(values_HWC: np.ndarray, mode: str) -> Image.Image:
    height, width = values_HWC.shape[:2]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(values_HWC).tobytes())


def _split(values_HWC: np.ndarray, colours: int) -> list[np.ndarray]:
    """Colours and alpha, which may have depths of their own."""
    parts = [values_HWC[:, :, :colours], values_HWC[:, :, colours:]]
    return [part for part in parts if part.shape[2]]


def _load_bytes(encoded: bytes, form: str, rawmode: str | None) -> tuple[np.ndarray, dict[Any, Any]]:
    """Pixels and info of a file, read with the raw mode that Pillow chooses (None), with another one, or with that of
    the other byte of every sample. Colours stay multiplied by alpha."""
    with Image.open(io.BytesIO(encoded), formats=[form]) as image:
        assert isinstance(image, ImageFile.ImageFile)
        modes = (
            _other(tile) if rawmode == "other byte" else rawmode or _straight(tile) for tile in image.tile
        )
        image.tile = [
            tile._replace(args=_with_rawmode(tile.args, mode)) for tile, mode in zip(image.tile, modes)
        ]
        image.load()
        return np.array(image), dict(image.info)


def _rawmode(tile: Any) -> str:
    args = tile.args
    return str(args[0] if isinstance(args, tuple) else args)


def _straight(tile: Any) -> str:
    """The raw mode of a tile; that of plain colours if they are multiplied by alpha, which Pillow divides in 8 bits."""
    return _rawmode(tile).replace("RGBa;", "RGBA;")


def _other(tile: Any) -> str:
    rawmode = _straight(tile)
    return rawmode[:-1] + _OTHER_BYTE.get(rawmode[-1], rawmode[-1])


def _with_rawmode(args: Any, rawmode: str) -> Any:
    return (rawmode, *args[1:]) if isinstance(args, tuple) else rawmode


def _encoded(image: Image.Image) -> bytes:
    """All bytes of a picture's file, which is still open because it is not loaded."""
    file = getattr(image, "fp", None)
    if file is None or file.closed:
        return b""
    at = file.tell()
    file.seek(0)
    data = bytes(file.read())
    file.seek(at)
    return data
