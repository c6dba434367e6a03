"""The blocks of picture files: finds files that were cut off, also where the first picture is whole."""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""PNG's colour type -> samples per pixel."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row and steps of the passes of an interlaced PNG."""
_TIFF_PLANES, _TIFF_SAMPLES = 284, 277
_TIFF_BLOCKS = ((273, 279), (324, 325))
"""Tags of the offsets and lengths of strips, and of tiles."""
MAX_PAGES = 1000
"""Pages of a TIFF that are searched for a cut."""


def find_cut(data: bytes, image: Image.Image) -> str | None:
    """Describes where the file of an open picture is cut off; None if all of its blocks are there.

    Decoders read the first picture only, and some of them leave black what is missing.
    """
    form = image.format
    if form == "PNG":
        return _find_png_cut(data)
    if form == "GIF":
        return None if count_gif_frames(data) else "the GIF is truncated inside a block"
    if form in ("AVIF", "HEIF", "JPEG2000"):
        return _find_box_cut(data, form)
    if form == "MPO":
        return _find_mpo_cut(data, image)
    return _find_tiff_cut(data, image) if form == "TIFF" else None


# ---- PNG


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte of the content, its length) of the chunks of a PNG; the content may end beyond the data."""
    at = 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], at + 8, length
        at += 12 + length


def read_png_chunk(data: bytes, name: bytes) -> bytes | None:
    """The content of the first PNG chunk of this name, wherever it is."""
    if name not in data:
        return None
    return next((data[at : at + length] for found, at, length in png_chunks(data) if found == name), None)


def _find_png_cut(data: bytes) -> str | None:
    for name, at, length in png_chunks(data):
        if at + length + 4 > len(data):
            return f"the PNG is truncated inside its chunk {name.decode('latin-1')!a}"
        if name == b"IEND":
            break
    return None


def has_png_rows(data: bytes) -> bool:
    """Whether a PNG's compressed data hold all rows; Pillow leaves missing ones black."""
    chunks = list(png_chunks(data))
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, chunks[0][1])
    bits = depth * _PNG_SAMPLES.get(colour, 1)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    wanted = 0
    for x, y, step_x, step_y in passes:
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            wanted += rows * (1 + (columns * bits + 7) // 8)
    inflater, found = zlib.decompressobj(), 0
    for name, at, length in chunks:
        if name != b"IDAT":
            continue
        piece = data[at : at + length]
        while piece and found < wanted and not inflater.eof:
            found += len(inflater.decompress(piece, 1 << 20))
            piece = inflater.unconsumed_tail
    if not inflater.eof and found < wanted:
        found += len(inflater.flush())
    return found >= wanted


# ---- GIF


def count_gif_frames(data: bytes) -> int:
    """The number of pictures of a GIF; 0 if the file ends inside a block. Many GIFs have no end mark."""
    at, frames = 13 + _gif_palette(data[10]), 0
    while at < len(data):
        kind = data[at]
        if kind == 0x2C:
            if at + 10 > len(data):
                return 0
            frames += 1
            at += 10 + _gif_palette(data[at + 9]) + 1
        elif kind == 0x21:
            at += 2
        else:  # the end mark, or bytes that follow the last block
            return frames
        while True:
            if at >= len(data):
                return 0
            length = data[at]
            at += 1 + length
            if length == 0:
                break
    return frames


def _gif_palette(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


# ---- boxes: AVIF, HEIF, JPEG 2000


def _find_box_cut(data: bytes, form: str) -> str | None:
    if data[4:8] not in (b"ftyp", b"jP  "):  # a bare JPEG 2000 codestream
        return None
    at = 0
    while at < len(data):
        length, header = int.from_bytes(data[at : at + 4], "big"), 8
        if length == 1:
            length, header = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if length == 0:  # to the end of the file
            return None
        if at + header > len(data) or at + length > len(data):
            return f"the {form} is truncated inside its box {data[at + 4 : at + 8].decode('latin-1')!a}"
        if length < header:
            return f"the {form} has a box of {length} bytes at byte {at}"
        at += length
    return None


# ---- MPO and TIFF


def _find_mpo_cut(data: bytes, image: Any) -> str | None:
    """Programs that remove the further pictures leave their list in place; only a picture that is there in part is
    a sign of a cut."""
    base = data.index(b"MPF\0") + 4
    for number, entry in enumerate(image.mpinfo[0xB002][1:], 2):
        start = base + entry["DataOffset"]
        if start < len(data) < start + entry["Size"] and data[start : start + 2] == b"\xff\xd8":
            return f"the MPO is truncated inside picture {number}"
    return None


def _find_tiff_cut(data: bytes, image: Any) -> str | None:
    if not image.use_load_libtiff:
        covered = sum((right - left) * (lower - upper) for _, (left, upper, right, lower), *_ in image.tile)
        planes = image.tag_v2.get(_TIFF_SAMPLES, 1) if image.tag_v2.get(_TIFF_PLANES) == 2 else 1
        wanted = image.tag_v2[256] * image.tag_v2[257] * planes
        if covered < wanted:
            return f"the TIFF has data for {covered} of {wanted} pixels"
    for page in range(1, min(image.n_frames, MAX_PAGES) if image.is_animated else 1):
        image.seek(page)
        for offsets, lengths in _TIFF_BLOCKS:
            ends = map(sum, zip(image.tag_v2.get(offsets, ()), image.tag_v2.get(lengths, ())))
            if max(ends, default=0) > len(data):
                return f"the TIFF is truncated inside page {page + 1}"
    image.seek(0)
    return None
