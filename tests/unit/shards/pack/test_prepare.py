"""The handling of single pictures: odd formats, damage, shrinking, filters, captions and persons."""

import io
import os
import random
import socket
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data

from shards.detect.types import Person
from shards.format.index import index_path, read_index
from shards.format.manifest import read_manifest
from shards.pack.pipeline import PackResult, PackSettings, pack
from shards.pack.prepare import Filters
from shards.pack.shrink import Shrink, reencode
from shards.pictures.decode import check_picture, decode_picture, decode_scaled
from shards.pictures.formats import MAX_PIXELS, BadPicture
from shards.pictures.jpeg import read_jpeg_header
from shards.pictures.orientation import read_orientation
from shards.pictures.pixels import WHITE
from shards.sources import Record
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_USER
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.views import decode_tensor

PHOTO = Image.fromarray(data.astronaut())
SMALL = PHOTO.resize((96, 64))


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return encoded(SMALL, "JPEG", exif=exif)


def bomb(side: int) -> bytes:
    """A PNG of under 100 bytes whose header promises side x side pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def huge_jpeg(side: int) -> bytes:
    """A JPEG whose header promises side x side pixels."""
    good = bytearray(encoded(SMALL, "JPEG"))
    at = good.index(b"\xff\xc0")
    good[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(good)


def packed(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> PackResult:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    settings = PackSettings(str(tmp_path / "t.parquet"), **{"persons": "none", **options})
    return pack(settings, tmp_path / "out")


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    shards = read_manifest(folder).shards
    return {row["key"]: row for e in shards for row in read_index(index_path(folder, e.name)).to_pylist()}


ODD = {
    "cmyk": (encoded(SMALL.convert("CMYK"), "JPEG"), (96, 64)),
    "grey": (encoded(SMALL.convert("L"), "JPEG"), (96, 64)),
    "progressive": (encoded(SMALL, "JPEG", progressive=True), (96, 64)),
    "sixteen-bit": (
        encoded(Image.fromarray((np.arange(64 * 96).reshape(64, 96) * 10).astype(np.uint16)), "PNG"),
        (96, 64),
    ),
    "palette": (encoded(SMALL.quantize(16), "PNG"), (96, 64)),
    "transparent-palette": (encoded(SMALL.quantize(16), "PNG", transparency=3), (96, 64)),
    "one-bit": (encoded(SMALL.convert("1"), "PNG"), (96, 64)),
    "animated-webp": (encoded(SMALL, "WEBP", save_all=True, append_images=[SMALL.rotate(90)]), (96, 64)),
    "animated-png": (encoded(SMALL, "PNG", save_all=True, append_images=[SMALL.rotate(90)]), (96, 64)),
    "lossless-webp": (encoded(SMALL.convert("RGBA"), "WEBP", lossless=True), (96, 64)),
    **{f"exif-{o}": (turned(o), (64, 96) if o >= 5 else (96, 64)) for o in range(1, 9)},
}


@pytest.mark.parametrize("check", ["decode", "header"])
def test_odd_pictures_pass_through_with_their_upright_sides(check: str, tmp_path: Path) -> None:
    result = packed(tmp_path, [{"key": k, "image": image} for k, (image, _) in ODD.items()], check=check)
    assert result.rejected == []
    found = rows_of(tmp_path / "out")
    assert {key: (row["width"], row["height"]) for key, row in found.items()} == {
        k: s for k, (_, s) in ODD.items()
    }
    reader = ShardReader.from_folder(tmp_path / "out", "x")
    images = {reader.read(0, row).key: reader.read(0, row).image for row in range(len(ODD))}
    assert images == {key: image for key, (image, _) in ODD.items()}


BAD = {
    "truncated-jpeg": (encoded(SMALL, "JPEG")[:-40], "corrupt"),
    "truncated-png": (encoded(SMALL, "PNG")[:-400], "corrupt"),
    "truncated-webp": (encoded(SMALL, "WEBP")[:-40], "corrupt"),
    "empty": (b"", "empty"),
    "text": (b"this is no picture\n", "corrupt"),
    "html": (b"<!doctype html><title>404</title>", "corrupt"),
    "eps": (encoded(SMALL, "EPS"), "format"),
    "ico": (encoded(SMALL, "ICO"), "format"),
    "png-bomb": (bomb(30_000), "too_large"),
    "jpeg-bomb": (huge_jpeg(30_000), "too_large"),
}


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_are_refused_with_their_reason(workers: int, tmp_path: Path) -> None:
    names = {f"{key}.jpg": image for key, (image, _) in BAD.items()}
    (tmp_path / "in").mkdir()
    for name, image in {**names, "good.jpg": encoded(SMALL, "JPEG")}.items():
        (tmp_path / "in" / name).write_bytes(image)
    settings = PackSettings(str(tmp_path / "in"), "folder", persons="none")
    result = pack(settings, tmp_path / "out", workers=workers)
    assert {r.source: r.reason for r in result.rejected} == {
        f"{k}.jpg": reason for k, (_, reason) in BAD.items()
    }
    assert (result.records, result.packed) == (len(BAD) + 1, {"": 1})
    details = {r.source: r.detail for r in result.rejected}
    assert all(str(MAX_PIXELS) in details[f"{kind}-bomb.jpg"] for kind in ("png", "jpeg"))


def test_damage_is_noticed_at_an_eighth_of_the_size_exactly_where_a_full_decode_notices_it() -> None:
    photo = encoded(PHOTO.resize((200, 150)), "JPEG", quality=85)
    draw = random.Random(0)
    verdicts = []
    for _ in range(120):
        damaged = bytearray(photo)
        for _ in range(draw.randint(1, 20)):
            damaged[draw.randrange(650, len(damaged))] = draw.randrange(256)
        if draw.random() < 0.3:
            del damaged[draw.randrange(650, len(damaged)) :]
        both = []
        for pixels in (None, MAX_PIXELS):
            try:
                check_picture(bytes(damaged), pixels_side=pixels)
                both.append(True)
            except BadPicture:
                both.append(False)
        verdicts.append(tuple(both))
    assert {a == b for a, b in verdicts} == {True}
    assert 20 < sum(a for a, _ in verdicts) < 100  # some of each


def header_of(file: bytes) -> tuple[int, int, int]:
    """Width, height and orientation as Pillow reads them."""
    with Image.open(io.BytesIO(file)) as image:
        return (*image.size, read_orientation(image))


def test_the_quick_header_reader_agrees_with_pillow() -> None:
    common = [file for file, _ in ODD.values() if read_jpeg_header(file) is not None]
    assert [read_jpeg_header(file)[:3] for file in common] == [header_of(file) for file in common]
    assert {header_of(file)[2] for file in common} == set(range(1, 9))
    assert read_jpeg_header(ODD["progressive"][0]) == (96, 64, 1, 3, False)
    assert read_jpeg_header(encoded(SMALL, "JPEG")[:100]) is None
    assert read_jpeg_header(b"\xff\xd8") is None
    assert read_jpeg_header(huge_jpeg(30_000)) is None
    assert read_jpeg_header(encoded(SMALL, "PNG")) is None


def moved_exif(place: str) -> bytes:
    """A JPEG of orientation 6 whose EXIF is at an unusual, but legal place."""
    file = turned(6)
    start = file.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(file[start + 2 : start + 4], "big")
    exif, rest = file[start:end], file[:start] + file[end:]
    if place == "after a fill byte":
        return file[:start] + b"\xff" + file[start:]
    if place == "after the frame header":
        frame = rest.index(b"\xff\xc0")
        at = frame + 2 + int.from_bytes(rest[frame + 2 : frame + 4], "big")
        return rest[:at] + exif + rest[at:]
    assert place == "in two segments"
    content = exif[10:]
    segments = [b"Exif\0\0" + half for half in (content[:9], content[9:])]
    joined = b"".join(b"\xff\xe1" + struct.pack(">H", len(half) + 2) + half for half in segments)
    return rest[:start] + joined + rest[start:]


@pytest.mark.parametrize("place", ["after a fill byte", "after the frame header", "in two segments"])
def test_exif_at_an_unusual_place_turns_the_picture_in_packing_and_in_training(place: str) -> None:
    file = moved_exif(place)
    assert read_jpeg_header(file)[:3] == header_of(file) == (96, 64, 6)
    for check in ("decode", "header"):
        picture = check_picture(file, check=check)
        assert (picture.width, picture.height) == (64, 96)
    packed_HW3, (trained_HW3, scale) = decode_picture(file), decode_scaled(file, WHITE, 2)
    np.testing.assert_array_equal(packed_HW3, decode_picture(turned(6)))
    np.testing.assert_array_equal(packed_HW3, trained_HW3)
    assert scale == 1


@pytest.mark.parametrize(
    "name", ["progressive", "grey", *(f"exif-{orientation}" for orientation in range(1, 9))]
)
def test_training_decodes_a_jpeg_to_the_pixels_that_packing_saw(name: str) -> None:
    file = {**{key: file for key, (file, _) in ODD.items()}, "grey": encoded(SMALL.convert("L"), "JPEG")}[
        name
    ]
    np.testing.assert_array_equal(decode_tensor(file).permute(1, 2, 0), decode_picture(file))


@pytest.mark.parametrize("form", ["EPS", "ICO", "TGA"])
def test_training_refuses_the_formats_that_packing_refuses(form: str) -> None:
    with pytest.raises(
        ValueError, match=f"^cannot be decoded: {form} pictures are not decoded; convert them"
    ):
        decode_tensor(encoded(SMALL, form))


def app1(content: bytes) -> bytes:
    """A JPEG with a segment where cameras write EXIF."""
    plain = encoded(SMALL, "JPEG")
    segment = b"Exif\0\0" + content
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]


def tiff(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Big-endian EXIF of (tag, type, count, 4 bytes)."""
    fields = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"MM\0*" + struct.pack(">IH", 8, len(entries)) + fields + bytes(4)


BROKEN_EXIF = {
    "garbage": app1(b"garbage"),
    "empty": app1(b""),
    "cut": app1(tiff((0x112, 3, 1, b"\0\6\0\0"))[:17]),
    "leads out": app1(tiff((0x10F, 2, 100, b"\xff\xff\xff\0"))),
    "text": app1(tiff((0x112, 2, 4, b"six\0"))),
    "nine": app1(tiff((0x112, 3, 1, b"\0\x09\0\0"))),
    "png": encoded(SMALL, "PNG", exif=b"Exif\0\0garbage"),
    "webp": encoded(SMALL, "WEBP", exif=b"Exif\0\0garbage"),
}


@pytest.mark.parametrize("check", ["decode", "header"])
def test_unreadable_exif_is_ignored(check: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"key": key.replace(" ", ""), "image": image} for key, image in BROKEN_EXIF.items()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = packed(tmp_path, rows, check=check)
        shrunk = [reencode(image, 0.5).rgb_HW3.shape for image in BROKEN_EXIF.values()]
    assert (result.rejected, [str(w.message) for w in said], capfd.readouterr().err) == ([], [], "")
    assert {(row["width"], row["height"]) for row in rows_of(tmp_path / "out").values()} == {(96, 64)}
    assert set(shrunk) == {(32, 48, 3)}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_pixels_equal_pillows(form: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x112] = orientation
    image = encoded(SMALL, form, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB"))
    np.testing.assert_array_equal(check_picture(image, pixels_side=MAX_PIXELS).rgb_HW3, expected)


def test_pipes_devices_sockets_and_folders_that_are_called_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.jpg").write_bytes(encoded(SMALL, "JPEG"))
    os.mkfifo(tmp_path / "in/pipe.jpg")
    (tmp_path / "in/zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "in/folder").mkdir()
    (tmp_path / "t.csv").write_text(
        "path\n" + "".join(f"in/{name}\n" for name in ("good.jpg", "pipe.jpg", "zero.jpg", "s.jpg", "folder"))
    )
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "in/s.jpg"))
        result = pack(PackSettings(str(tmp_path / "t.csv"), persons="none"), tmp_path / "out")
    assert result.packed == {"": 1}
    assert {r.source: (r.reason, r.detail.partition(": ")[0]) for r in result.rejected} == {
        "t.csv#1": ("unreadable", "not a regular file"),
        "t.csv#2": ("unreadable", "not a regular file"),
        "t.csv#3": ("unreadable", "No such device or address"),
        "t.csv#4": ("unreadable", "Is a directory"),
    }


# ---- shrinking


@pytest.mark.parametrize(
    ("limits", "size", "expected"),
    [
        ({"max_side": 128}, (512, 256), (128, 64)),
        ({"min_side": 128}, (512, 256), (256, 128)),
        ({"max_side": 200, "min_side": 128}, (512, 256), (200, 100)),
        ({"max_side": 512}, (512, 256), (512, 256)),
        ({"max_side": 100}, (1000, 3), (100, 1)),
    ],
)
def test_sides_after_shrinking(
    limits: dict[str, int], size: tuple[int, int], expected: tuple[int, int], tmp_path: Path
) -> None:
    image = encoded(PHOTO.resize(size), "JPEG")
    packed(tmp_path, [{"key": "a", "image": image}], shrink=Shrink(**limits))
    row = rows_of(tmp_path / "out")["a"]
    assert (row["width"], row["height"]) == expected
    stored = ShardReader.from_folder(tmp_path / "out", "x").read(0, 0).image
    assert (stored == image) == (expected == size)
    assert Image.open(io.BytesIO(stored)).size == expected


def test_shrunk_pictures_keep_format_transparency_and_look() -> None:
    rgba = PHOTO.convert("RGBA").resize((200, 200))
    rgba.putalpha(Image.linear_gradient("L").resize((200, 200)))
    for form in ("PNG", "WEBP"):
        data_, _, rgb, _ = reencode(encoded(rgba, form), 0.25, 90)
        again = Image.open(io.BytesIO(data_))
        assert (again.format, again.mode, again.size) == (form, "RGBA", (50, 50))
        assert rgb.shape == (50, 50, 3)
    data_, _, rgb, _ = reencode(encoded(PHOTO, "JPEG", quality=95), 0.25, 95)
    expected = np.asarray(PHOTO.resize((128, 128), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(Image.open(io.BytesIO(data_))).astype(int) - expected).mean() < 4
    assert np.abs(rgb.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_shrunk_picture_is_upright_and_has_no_orientation(orientation: int) -> None:
    data_, _, rgb, _ = reencode(turned(orientation), 0.5, 90)
    again = Image.open(io.BytesIO(data_))
    assert again.size == ((48, 32) if orientation == 3 else (32, 48)) == (rgb.shape[1], rgb.shape[0])
    assert again.getexif().get(0x112) is None
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned(orientation)))).resize(again.size)
    assert np.abs(np.asarray(again).astype(int) - np.asarray(upright).astype(int)).mean() < 12


def profile(space: bytes) -> bytes:
    """An ICC profile whose header names a colour space."""
    from PIL import ImageCms

    data_ = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data_[16:20] = space
    return bytes(data_)


@pytest.mark.parametrize(
    ("mode", "form", "space", "stays"),
    [
        ("RGB", "JPEG", b"RGB ", True),
        ("RGB", "PNG", b"RGB ", True),
        ("RGB", "WEBP", b"RGB ", True),
        ("RGBA", "PNG", b"RGB ", True),
        ("CMYK", "JPEG", b"CMYK", False),
        ("L", "JPEG", b"GRAY", False),
        ("L", "PNG", b"GRAY", False),
        ("LA", "PNG", b"GRAY", False),
    ],
)
def test_a_shrunk_picture_keeps_only_a_profile_of_rgb(
    mode: str, form: str, space: bytes, stays: bool
) -> None:
    given = encoded(SMALL.convert(mode), form, icc_profile=profile(space))
    again = Image.open(io.BytesIO(reencode(given, 0.5).data))
    assert again.mode == ("RGBA" if "A" in mode else "RGB")
    assert again.info.get("icc_profile") == (profile(space) if stays else None)


# ---- filters, captions, persons


def test_filters_refuse_with_reason_and_numbers(tmp_path: Path) -> None:
    rows = [
        {"key": "good", "image": encoded(SMALL, "JPEG"), "caption": "hello", "label": "joy"},
        {
            "key": "small",
            "image": encoded(SMALL.resize((40, 30)), "JPEG"),
            "caption": "hello",
            "label": "joy",
        },
        {
            "key": "large",
            "image": encoded(SMALL.resize((300, 200)), "JPEG"),
            "caption": "hello",
            "label": "joy",
        },
        {
            "key": "long",
            "image": encoded(SMALL.resize((192, 64)), "JPEG"),
            "caption": "hello",
            "label": "joy",
        },
        {"key": "short", "image": encoded(SMALL.rotate(1), "JPEG"), "caption": "hi", "label": "joy"},
        {"key": "none", "image": encoded(SMALL.rotate(2), "JPEG"), "caption": "", "label": "joy"},
        {"key": "label", "image": encoded(SMALL.rotate(3), "JPEG"), "caption": "hello", "label": "fear"},
    ]
    filters = Filters(side=(64, 128), aspect=2.0, caption=(3, 80))
    result = packed(tmp_path, rows, filters=filters, keep_labels=("joy",))
    assert {r.source: (r.reason, r.detail) for r in result.rejected} == {
        "small": ("side", "shorter side of 30 pixels, wanted 64 to 128"),
        "large": ("side", "shorter side of 200 pixels, wanted 64 to 128"),
        "long": ("aspect", "192 x 64 pixels are 3.00 : 1, wanted at most 2 : 1"),
        "short": ("caption", "2 characters, wanted 3 to 80"),
        "none": ("caption", "0 characters, wanted 3 to 80"),
        "label": ("label", "label 'fear' is not selected by --keep-label"),
    }
    assert list(rows_of(tmp_path / "out")) == ["good"]


def test_composed_captions_are_stored_and_their_templates_recorded(tmp_path: Path) -> None:
    rows = [{"key": "a", "image": encoded(SMALL, "JPEG"), "label": "awe", "scene": "ice_rink"}]
    packed(tmp_path, rows, captions="shipped")
    assert rows_of(tmp_path / "out")["a"]["captions"] == [
        "A picture that evokes awe, showing an ice rink.",
        "A picture of an ice rink, evoking awe.",
    ]
    templates = read_manifest(tmp_path / "out").provenance["captions"]["templates"]
    assert any("{label}" in template for template in templates)


def test_persons_of_the_source_are_kept_and_sorted_and_others_are_detected(tmp_path: Path) -> None:
    people = [{"box": [0.0, 0.0, 0.5, 0.5], "score": 0.3}, {"box": [0.2, 0.2, 1.0, 1.0], "score": 0.8}]
    photo = encoded(PHOTO, "JPEG", quality=95)
    rows = [
        {"key": "own", "image": photo + b"\0", "persons": people},
        {"key": "looked", "image": photo, "persons": None},
    ]
    packed(tmp_path, rows, persons="nanodet")
    found = rows_of(tmp_path / "out")
    assert [person["score"] for person in found["own"]["persons"]] == [0.8, 0.3]
    [person] = found["looked"]["persons"]
    assert person["score"] > 0.6
    (tmp_path / "again").mkdir()
    packed(tmp_path / "again", rows, persons="source")
    found = rows_of(tmp_path / "again/out")
    assert (len(found["own"]["persons"]), found["looked"]["persons"]) == (2, [])


def test_boxes_that_were_drawn_in_the_stored_picture_are_turned_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = (Person((0.0, 0.0, 0.25, 0.5), 1.0),)
    records = [
        Record(key, turned(6) + bytes([i]), persons=people, boxes_size=size)
        for i, (key, size) in enumerate({"stored": (96, 64), "upright": (64, 96), "unknown": None}.items())
    ]
    monkeypatch.setattr("shards.pack.pipeline.open_source", lambda *_: iter(records))
    pack(PackSettings("any", persons="none"), tmp_path / "out")
    found = {key: row["persons"][0]["box"] for key, row in rows_of(tmp_path / "out").items()}
    assert found == {
        "stored": [0.5, 0.0, 1.0, 0.25],
        "upright": [0.0, 0.0, 0.25, 0.5],
        "unknown": [0.0, 0.0, 0.25, 0.5],
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep-side", "x"], "--keep-side=x: expected MIN or MIN:MAX"),
        (["--keep-side", "200:100"], "--keep-side=200:100: the minimum is larger than the maximum"),
        (["--keep-aspect", "0.5"], "--keep-aspect=0.5: give a finite number of 1 or more"),
        (["--keep-aspect", "nan"], "--keep-aspect=nan: give a finite number of 1 or more"),
        (["--keep-aspect", "inf"], "--keep-aspect=inf: give a finite number of 1 or more"),
        (["--shard-size", "nan"], "--shard-size=nan: give a positive number of MB"),
        (["--shard-size", "inf"], "--shard-size=inf: give a positive number of MB"),
        (["--shard-size", "1e308"], "--shard-size=1e+308: give a positive number of MB"),
        (["--quality", "0"], "--quality=0: give 1 to 100"),
        (["--preset", "nine"], "--preset=nine: not known"),
        (["--captions", "/nowhere.yaml"], "--captions=/nowhere.yaml: cannot be read"),
        (["--part", "9/8"], "--part=9/8: expected I/N"),
        (["--part", "x"], "--part=x: expected I/N"),
        (["--persons", "onnx:/nowhere.onnx"], "onnx:/nowhere.onnx"),
    ],
)
def test_wrong_options_are_one_line_and_leave_no_files(
    arguments: list[str], says: str, photo_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [
        "shards",
        "pack",
        str(photo_folder),
        str(tmp_path / "out"),
        "--layout",
        "folder",
        "--persons",
        "none",
    ]
    assert run([*command, *arguments]) == EXIT_USER
    [line] = [text for text in capfd.readouterr().err.splitlines() if "uniemox: error" in text]
    assert says in line
    assert list(tmp_path.iterdir()) == []


def test_an_empty_source_is_not_this_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["shards", "pack", "", str(tmp_path / "out")]) == EXIT_USER
    assert 'SOURCE="": is empty; give a table, a folder or tars' in capfd.readouterr().err


def test_settings_that_are_not_unicode_are_escaped() -> None:
    made = PackSettings("a\udcff", columns={"image": "\udcfe"}, keep_labels=("\udcfd",)).to_json()
    assert (made["source"], made["columns"], made["keep_labels"]) == (
        "a\\udcff",
        {"image": "\\udcfe"},
        ["\\udcfd"],
    )


def test_part_zero_is_the_last_so_that_counting_from_zero_covers_the_same() -> None:
    from shards.pack.settings import parse_part

    assert [parse_part(f"{i}/3") for i in range(4)] == [(3, 3), (1, 3), (2, 3), (3, 3)]
