"""libtiff, the library with which Pillow decodes compressed TIFFs."""

import ctypes
import io
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_LIBRARY = re.compile(r"(/\S*/libtiff[^/\s]*\.so[^/\s]*)$", re.MULTILINE)


_BITS, _PHOTOMETRIC, _SAMPLES, _PLANES = 258, 262, 277, 284
_COPIED = (256, 257, 259, 266, 278, 317, 322, 323)
"""Tags with the sizes of the picture and its strips or tiles, and with their compression."""
_PARTS = (273, 279, 324, 325)
"""Tags with a number for each strip or tile: where it begins, and its bytes."""
_LONG = 4
"""The type of numbers of 32 bits."""


def has_wide_planes(image: Image.Image) -> bool:
    """Whether an open picture is a TIFF that stores its colours one after the other, in more than 8 bits. Pillow reads
    the wrong bytes of them, or only the upper ones."""
    if image.format != "TIFF" or image.mode not in ("RGB", "RGBA", "CMYK"):
        return False
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    return bool(tags.get(_PLANES) == 2 and max(tags.get(_BITS, (8,))) > 8)


def read_planes(image: Image.Image, encoded: bytes) -> np.ndarray | None:
    """The values of a TIFF for which `has_wide_planes` is true, H×W×C, each plane read as a grey TIFF of its own: by
    another directory that names the plane's strips or tiles. None for a BigTIFF, and values that are not of 16 bits."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    prefix = encoded[:4]
    if prefix not in (b"II*\0", b"MM\0*") or set(tags[_BITS]) != {16}:
        return None
    count = len(tags[_BITS])
    planes = []
    for plane in range(count):
        values = {tag: [int(tags[tag])] for tag in _COPIED if tag in tags}
        for tag in _PARTS:
            if tag in tags:
                each = len(tags[tag]) // count
                values[tag] = list(tags[tag][plane * each : (plane + 1) * each])
        values |= {_BITS: [16], _PHOTOMETRIC: [1], _SAMPLES: [1]}
        grey = _with_directory(encoded, values)
        with Image.open(io.BytesIO(grey), formats=["TIFF"]) as opened:
            planes.append(np.asarray(opened).astype(np.uint16))
    return np.stack(planes, axis=2)


def _with_directory(encoded: bytes, values: dict[int, list[int]]) -> bytes:
    """A TIFF file with another first directory, which is put at its end; `values` are those of its tags."""
    order = "<" if encoded.startswith(b"I") else ">"
    at = len(encoded) + len(encoded) % 2
    behind = at + 2 + 12 * len(values) + 4
    entries, more = b"", b""
    for tag, numbers in sorted(values.items()):
        data = struct.pack(f"{order}{len(numbers)}L", *numbers)
        if len(numbers) > 1:
            data, more = struct.pack(f"{order}L", behind + len(more)), more + data
        entries += struct.pack(f"{order}HHL", tag, _LONG, len(numbers)) + data
    head = encoded[:4] + struct.pack(f"{order}L", at)
    directory = struct.pack(f"{order}H", len(values)) + entries + bytes(4) + more
    return head + encoded[8:].ljust(at - 8, b"\0") + directory


def silence_libtiff() -> None:
    """Stops libtiff from writing to stderr: Pillow raises an error for what matters, without libtiff's message.

    Its handlers are those of the process. Nothing happens if Pillow was built without a shared libtiff.
    """
    try:
        loaded = _LIBRARY.search(Path("/proc/self/maps").read_text())
        if loaded is not None:
            library = ctypes.CDLL(loaded[1])
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)
    except (OSError, AttributeError):
        return
