"""Recognises picture formats by the first bytes of a file; names of files do not count.

Every file is one of three things: a picture of an accepted format, a picture of a format that is refused by name, or
not a picture. `shards/pictures/decode.py` decodes the accepted ones.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec

from PIL import features

from uniemox_dist.core.errors import install_command

HEAD_BYTES = 1024
"""Number of first bytes of a file that decide its format; fewer are enough for everything but SVG."""
MAX_PIXELS = 178_956_970
"""Pictures with more pixels are refused as decompression bombs (Pillow's own limit, 1 GiB as 16-bit RGB)."""


class BadPicture(ValueError):
    """A picture that cannot be used.

    `reason` is the word that `rejected.parquet` lists: `empty`, `format`, `too_large`, `corrupt` or `unreadable`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class PictureFormat:
    """A format of pictures."""

    name: str
    """Pillow's name for formats that can be decoded, such as JPEG2000; the usual name for all others."""
    refusal: str | None = None
    """Why pictures of this format are refused, in one line; None if they are accepted."""

    @property
    def is_accepted(self) -> bool:
        """Whether pictures of this format are decoded here."""
        return self.refusal is None


def identify_format(head: bytes) -> PictureFormat | None:
    """The format of a file by its first bytes (`HEAD_BYTES` of them, or all of a shorter file); None if it is not a
    picture. Damage further on is found by decoding only."""
    for magic, name in _STARTS:
        if head.startswith(magic):
            return _named(name)
    if head[4:8] == b"ftyp":
        name = _iso_name(head)
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        name = "WEBP"
    elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        name = "Canon raw (CR2)" if head[8:10] == b"CR" else "TIFF"
    elif head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        name = "BMP"
    elif _PORTABLE.match(head):
        name = "PPM"
    elif head[:4] in (b"\0\0\1\0", b"\0\0\2\0") and 0 < int.from_bytes(head[4:6], "little") < 256:
        name = "ICO" if head[2] == 1 else "CUR"
    elif head[:1] == b"\x0a" and head[1:2] in (b"\0", b"\2", b"\3", b"\4", b"\5") and head[2:3] == b"\1":
        name = "PCX"
    elif head[128:132] == b"DICM":
        name = "DICOM"
    elif head[:4] == b"\1\0\0\0" and head[40:44] == b" EMF":
        name = "EMF"
    elif _TARGA.match(head) and head[12:14] != b"\0\0" and head[14:16] != b"\0\0":
        name = "TGA"
    elif _SVG.match(head):
        name = "SVG"
    else:
        return None
    return _named(name) if name else None


_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    # Refused formats.
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"8BPS", "PSD"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"II\xbc\1", "JPEG XR"),
    (b"\xff\xd8", "JPEG"),  # cut off after its first marker, or damaged there
    (b"DDS ", "DDS"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"gimp xcf ", "XCF"),
    (b"qoif", "QOI"),
    (b"P7\n", "PAM"),
    (b"PF\n", "colour PFM"),
    (b"icns", "ICNS"),
    (b"SIMPLE  =", "FITS"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\x01\xda\x00", "SGI"),
    (b"\x01\xda\x01", "SGI"),
    (b"\x59\xa6\x6a\x95", "Sun raster"),
    (b"farbfeld", "farbfeld"),
    (b"BPG\xfb", "BPG"),
    (b"FLIF", "FLIF"),
    (b"AT&TFORM", "DjVu"),
    (b"/* XPM */", "XPM"),
    (b"FUJIFILMCCD-RAW", "Fujifilm raw (RAF)"),
    (b"IIU\0", "Panasonic raw (RW2)"),
    (b"IIRO", "Olympus raw (ORF)"),
    (b"IIRS", "Olympus raw (ORF)"),
    (b"MMOR", "Olympus raw (ORF)"),
    (b"FOVb", "Sigma raw (X3F)"),
    (b"\0MRM", "Minolta raw (MRW)"),
)
_BMP_HEADERS = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
_PORTABLE = re.compile(rb"P[1-6][ \t\r\n]+(#|\d)|Pf\s+\d")
_TARGA = re.compile(rb".\0[\2\3\n\v]\0{5}.{8}[\x08\x10\x18\x20][\0-\x3f]", re.S)  # it has no magic number
_SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?(?:<\?xml[^>]*>|<!--(?:(?!-->).)*-->|<!DOCTYPE\s+svg[^>]*>|\s)*<(?:svg:)?svg[\s>]",
    re.S,
)
_HEVC_BRANDS = frozenset(
    {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
)


def _iso_name(head: bytes) -> str:
    """The format of a file of ISO boxes by its brands (ISO 14496-12, 4.3); empty for videos."""
    end = min(int.from_bytes(head[:4], "big"), 256)
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end, 4))]
    if brands[0] == b"crx ":
        return "Canon raw (CR3)"
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    if brands[0] == b"jp2 " or brands[0] == b"jpx ":
        return "JPEG2000"
    return "HEIF" if not _HEVC_BRANDS.isdisjoint(brands) else ""


def _named(name: str) -> PictureFormat:
    return PictureFormat(name, _refusal(name))


def _refusal(name: str) -> str | None:
    if name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        return None
    if name == "JPEG2000":
        return (
            None
            if features.check("jpg_2000")
            else "JPEG 2000: this Pillow cannot decode it; install Pillow's wheel"
        )
    if name == "AVIF":
        return None if features.check("avif") else "AVIF: this Pillow cannot decode it; install pillow>=11.3"
    if name == "HEIF":
        return None if find_spec("pillow_heif") else f"HEIC needs pillow-heif: {install_command('heif')}"
    return f"{name} pictures are not decoded; convert them to PNG, JPEG or WebP"
