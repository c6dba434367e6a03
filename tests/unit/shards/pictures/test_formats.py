"""Files are known by their first bytes: accepted formats, formats refused by name, and what is no picture."""

import io
from typing import Any

import pytest
from PIL import Image

from shards.pictures.formats import HEAD_BYTES, identify_format

PICTURE = Image.new("RGB", (20, 12), (220, 20, 40))


def encoded(form: str, picture: Image.Image = PICTURE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_accepted_formats_are_known_by_their_content(form: str) -> None:
    found = identify_format(encoded(form)[:HEAD_BYTES])
    assert found is not None
    assert (found.name, found.is_accepted, found.refusal) == (form, True, None)


def test_variants_have_the_name_of_their_format() -> None:
    variants = {
        "MPO": "JPEG",
        "GIF": "GIF",
        "TIFF": "TIFF",
    }
    for form, name in variants.items():
        more = {} if form == "TIFF" else {"save_all": True, "append_images": [PICTURE.rotate(180)]}
        found = identify_format(encoded(form, **more))
        assert found is not None
        assert found.name == name
    names = [
        identify_format(encoded("TIFF", big_tiff=True)),
        identify_format(encoded("JPEG2000", no_jp2=True)),
        identify_format(encoded("PPM", PICTURE.convert("1"))),
        identify_format(encoded("PPM", PICTURE.convert("F"))),
        identify_format(b"P5 # a comment\n2 1\n255\n\0\xff"),
        identify_format(b"\xff\xd8"),
    ]
    assert [name and name.name for name in names] == ["TIFF", "JPEG2000", "PPM", "PPM", "PPM", "JPEG"]


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (encoded("EPS"), "EPS"),
        (encoded("ICO"), "ICO"),
        (encoded("TGA"), "TGA"),
        (encoded("PCX"), "PCX"),
        (encoded("SGI"), "SGI"),
        (encoded("DDS"), "DDS"),
        (b"8BPS\0\1", "PSD"),
        (b"P7\nWIDTH 4\n", "PAM"),
        (b"PF\n2 2\n-1.0\n", "colour PFM"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"II*\0\x10\0\0\0CR\2\0", "Canon raw (CR2)"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "Canon raw (CR3)"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (
            b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a > b -->\n<!DOCTYPE svg PUBLIC 'x'>\n<svg width='1'>",
            "SVG",
        ),
    ],
)
def test_other_picture_formats_are_refused_by_name(head: bytes, name: str) -> None:
    found = identify_format(head[:HEAD_BYTES])
    assert found is not None
    assert (found.name, found.is_accepted) == (name, False)
    assert found.refusal == f"{name} pictures are not decoded; convert them to PNG, JPEG or WebP"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xff",
        b"BM is how this text begins, and it is no bitmap",
        b"P3 is a model of a car",
        b"P60 3",
        b"<html><body><svg></svg></body></html>",
        b"<?xml version='1.0'?><note/>",
        b"%PDF-1.7",
        b"PK\3\4",
        b"\0\0\0\x18ftypisom\0\0\2\0isomiso2mp41",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"RIFF\0\0\0\0AVI LIST",
        b"\x7fELF\2\1\1\0",
        b"\0" * HEAD_BYTES,
        b'{"caption": "a dog"}',
        b"a dog on a lawn\n",
    ],
)
def test_other_files_are_no_pictures(head: bytes) -> None:
    assert identify_format(head) is None


def test_a_long_head_without_svg_is_decided_quickly() -> None:
    assert identify_format(b"<!-- " * (HEAD_BYTES // 5)) is None
    assert identify_format(b"<!---->" * (HEAD_BYTES // 7)) is None
    assert identify_format(b"<?xml " + b" " * HEAD_BYTES) is None
