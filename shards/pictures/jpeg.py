"""JPEG: headers, completeness, and pixels by libjpeg-turbo.

Pillow fills whatever is missing from a JPEG with grey and reports nothing. simplejpeg reports libjpeg's warnings, and
otherwise gives the same pixels in less time; Pillow decodes only what simplejpeg cannot, such as CMYK.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg

from shards.pictures.formats import MAX_PIXELS, BadPicture
from shards.pictures.orientation import parse_orientation

MAX_SCANS = 500
"""More scans than any encoder writes; decoding each of them passes over the whole picture."""

# The frame headers: baseline, extended, progressive; also arithmetic coding, which Pillow may be able to decode.
_FRAMES = (0xC0, 0xC1, 0xC2)
_ARITHMETIC = (0xC9, 0xCA)
_NEXT_MARKER = re.compile(
    rb"\xff[\x01-\xcf\xd8-\xfe]"
)  # within entropy-coded data: not a stuffed zero, not RSTn
_DAMAGE = re.compile(
    r"Corrupt JPEG data: (premature end|bad Huffman|bad arithmetic|found marker)"
    r"|extraneous bytes before marker 0xd[0-7]"
    r"|Premature end of JPEG file|Inconsistent progression"
)
"""libjpeg's warnings that mean wrong pixels."""
_MINOR = re.compile(
    r"unknown JFIF revision|Unknown Adobe|bad ICC|extraneous bytes before marker|Invalid SOS parameters"
)
"""Warnings about metadata, and about bytes between segments."""


class JpegHeader(NamedTuple):
    """The header of a JPEG."""

    width: int
    """Pixels as stored."""
    height: int
    orientation: int
    """The EXIF orientation, 1 to 8."""
    channels: int = 3
    """1 for grey, 3 for colour, 4 for CMYK."""
    has_more: bool = False
    """Whether it lists further pictures that follow the first one (MPO)."""


def is_jpeg(data: bytes) -> bool:
    """Whether the bytes are those of a JPEG: it has no transparency, and can be decoded at a smaller size."""
    return data[:2] == b"\xff\xd8"


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Reads the segments of a common JPEG in a tenth of Pillow's time.

    None if Pillow has to decide: other formats, rare kinds of JPEG, bytes between segments, a header that is cut off,
    or too many pixels. Fill bytes before a marker are skipped, as Pillow does (ITU-T T.81, B.1.1.2).
    """
    if not is_jpeg(data):
        return None
    at, size, exif, channels, has_more = 2, (0, 0), b"", 0, False
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xDA:  # the first scan ends the header
            width, height = size
            is_sound = 0 < width * height <= MAX_PIXELS
            return (
                JpegHeader(width, height, parse_orientation(exif), channels, has_more) if is_sound else None
            )
        if marker in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", data, at + 5)
            size = (width, height)
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif += data[at + (10 if exif else 4) : at + 2 + length]  # long EXIF is split over segments
        elif marker == 0xE2 and data[at + 4 : at + 8] == b"MPF\0":
            has_more = True
        elif not (0xE0 <= marker <= 0xEF or marker in (0xDB, 0xC4, 0xFE, 0xDD)):
            return None
        at += 2 + length
    return None


def decode_jpeg(data: bytes, scale: int = 1, *, colours: str = "RGB") -> np.ndarray | None:
    """The stored pixels of a whole JPEG, H×W×channels uint8 at 1/`scale` of its sides, rounded up.

    None if Pillow must decode it, because libjpeg-turbo's interface does not offer it (CMYK as RGB, 12 bits).

    Raises:
        BadPicture: reason `corrupt`, if data are missing or damaged.
    """
    if problem := _find_missing_scans(data):
        raise BadPicture("corrupt", problem)
    try:
        return _decode(data, scale, colours)
    except ValueError as error:
        problem = str(error)
    if _MINOR.search(problem):
        # libjpeg keeps the first warning only, so that a minor one hides the next: decode without its cause.
        data = _without_metadata(data)
        try:
            return _decode(data, scale, colours)
        except ValueError as error:
            problem = str(error)
    if _DAMAGE.search(problem):
        state = "truncated" if "remature end" in problem else "damaged"
        raise BadPicture("corrupt", f"the JPEG is {state} ({problem})")
    if not _MINOR.search(problem):
        return None
    try:
        return _decode(data, scale, colours, strict=False)
    except ValueError:
        return None


def check_jpeg(data: bytes, header: JpegHeader) -> bool:
    """Reads all compressed data of a JPEG, without most of the arithmetic of decoding. False if Pillow must do it.

    Raises:
        BadPicture: reason `corrupt`, if data are missing or damaged.
    """
    return decode_jpeg(data, 8, colours="CMYK" if header.channels == 4 else "GRAY") is not None


def _decode(data: bytes, scale: int, colours: str, strict: bool = True) -> np.ndarray:
    """Raises ValueError with libjpeg's first warning (if `strict`) or error."""
    least = {}
    if scale > 1:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        least = {"min_height": -(-height // scale), "min_width": -(-width // scale), "min_factor": scale}
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace=colours, strict=strict, **least)
    return pixels


class _Segment(NamedTuple):
    marker: int
    start: int
    """Position of the marker."""
    end: int
    """Position after the segment; for a scan, after its header."""


def _segments(data: bytes) -> Iterator[_Segment]:
    """The segments of a JPEG, found as libjpeg finds them: other bytes before a marker are skipped. Ends at the end of
    the picture, and where the data are cut."""
    at = 2
    while (found := _NEXT_MARKER.search(data, at)) is not None:
        start, marker = found.start(), data[found.start() + 1]
        at = found.end()
        if marker in (0x01, 0xD8):  # markers without content
            continue
        if marker == 0xD9 or at + 2 > len(data):
            return
        end = at + (data[at] << 8 | data[at + 1])
        if end > len(data):
            return
        yield _Segment(marker, start, end)
        at = end


def _find_missing_scans(data: bytes) -> str | None:
    """What is missing if a JPEG of several scans ends between two of them; libjpeg does not warn about it."""
    lowest: dict[int, bytearray] = {}  # by component: of each coefficient, the lowest bit that was sent
    is_progressive, scans = False, 0
    for marker, start, end in _segments(data):
        if marker in _FRAMES or marker in _ARITHMETIC:
            if end < start + 10 or end < start + 10 + 3 * data[start + 9]:
                return None  # libjpeg reports it
            is_progressive = marker in (0xC2, 0xCA)
            lowest = {data[start + 10 + 3 * i]: bytearray(b"\xff" * 64) for i in range(data[start + 9])}
        elif marker == 0xDA:
            count = data[start + 4]
            if end != start + 8 + 2 * count:
                return None
            first, last, bits = data[end - 3 : end] if is_progressive else (0, 63, 0)
            for i in range(count):
                if (sent := lowest.get(data[start + 5 + 2 * i])) is not None and first <= last < 64:
                    sent[first : last + 1] = bytes([bits & 15]) * (last + 1 - first)
            if not is_progressive and count == len(lowest):
                return None  # the only scan; whether it is whole, decoding tells
            scans += 1
            if scans > MAX_SCANS:
                return f"the JPEG has more than {MAX_SCANS} scans"
    missing = sum(any(sent) for sent in lowest.values())
    if not scans or not missing:
        return None
    return f"the JPEG is truncated after {scans} scans: {missing} of {len(lowest)} components lack data"


def _without_metadata(data: bytes) -> bytes:
    """A JPEG without comments, metadata and other bytes between its segments, and with valid parameters of a
    sequential scan. The segments that decide about its colours stay."""
    channels = next((data[s.start + 9] for s in _segments(data) if s.marker in _FRAMES), 3)
    parts, is_progressive = [data[:2]], False
    for marker, start, end in _segments(data):
        segment = bytearray(data[start:end])
        if marker == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) > 9:
            segment[9] = 1
        elif marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16:
            usual = 2 if channels == 4 else 1  # as libjpeg assumes
            segment[15] = segment[15] if segment[15] in (0, usual) else usual
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            continue
        if marker in _FRAMES:
            is_progressive = marker == 0xC2
        if marker == 0xDA:
            if not is_progressive:
                segment[-3:] = b"\0\x3f\0"
            return b"".join([*parts, bytes(segment), data[end:]])
        parts.append(bytes(segment))
    return data
