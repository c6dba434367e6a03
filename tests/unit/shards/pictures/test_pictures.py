"""One decoder: the pixels of every accepted format, and the refusal of files that are incomplete or hostile."""

import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import tifffile
from pictures import PHOTO, VARIANTS, chunk, encoded, png16
from PIL import Image, ImageOps

from shards.pack.shrink import reencode
from shards.pictures.decode import check_picture, decode_picture, decode_scaled
from shards.pictures.formats import BadPicture
from shards.pictures.jpeg import read_jpeg_header
from uniemox_dist.data.views import decode_tensor

RAMP = np.arange(16, dtype=np.uint16) * 273
"""0 to 4,095: twelve bits."""
STEPS = list(range(0, 256, 17))
"""The same as eight bits."""


def refusal(data: bytes) -> tuple[str, str]:
    """(reason, detail) of a refusal on which checking, decoding, training and converting agree."""
    found = set()
    for use in (check_picture, decode_picture, reencode):
        with pytest.raises(BadPicture) as caught:
            use(data)
        found.add((caught.value.reason, caught.value.detail))
    (refused,) = found
    with pytest.raises(ValueError, match="cannot be decoded") as told:
        decode_tensor(data)
    assert str(told.value) == f"cannot be decoded: {refused[1]}"
    return refused


def on_white(picture: Image.Image) -> np.ndarray:
    """Pillow's own pixels: upright, on white."""
    rgba = ImageOps.exif_transpose(picture).convert("RGBA")
    base = Image.new("RGB", rgba.size, (255, 255, 255))
    base.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(base)


# ---- pixels


@pytest.mark.parametrize("name", [name for name in VARIANTS if "16" not in name])
def test_pixels_are_those_of_pillows_plain_decode(name: str) -> None:
    data = VARIANTS[name]
    with Image.open(io.BytesIO(data)) as plain:
        expected = on_white(plain)
    np.testing.assert_array_equal(decode_picture(data), expected)
    np.testing.assert_array_equal(check_picture(data, pixels_side=10_000).rgb_HW3, expected)
    np.testing.assert_array_equal(decode_tensor(data).permute(1, 2, 0), expected)
    for check in ("decode", "header"):
        picture = check_picture(data, check=check)
        assert (picture.width, picture.height) == PHOTO.size


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg grey", "jpeg restarts"])
def test_a_jpeg_at_a_part_of_its_size_is_pillows_draft(name: str) -> None:
    for scale, size in ((2, (48, 32)), (4, (24, 16)), (8, (12, 8))):
        plain = Image.open(io.BytesIO(VARIANTS[name]))
        plain.draft(None, size)
        reduced, found = decode_scaled(VARIANTS[name], (255, 255, 255), scale)
        np.testing.assert_array_equal(reduced, plain.convert("RGB"))
        assert (found, reduced.shape[:2]) == (scale, size[::-1])


@pytest.mark.parametrize("form", ["TIFF", "AVIF", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(form, exif=exif, **({"quality": 95} if form == "AVIF" else {}))
    exif[0x112] = orientation  # Pillow has removed it
    upright = decode_picture(encoded("JPEG", exif=exif, quality=95))
    for check in ("decode", "header"):
        picture = check_picture(data, check=check)
        assert (picture.height, picture.width) == upright.shape[:2]
    assert np.abs(decode_picture(data).astype(int) - upright).mean() < 4  # lossy formats


def test_an_orientation_behind_the_pixels_of_a_png_counts_already_in_its_header() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    plain = encoded("PNG")
    late = plain[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + plain[-12:]
    sizes = {(p.width, p.height) for p in (check_picture(late, check="header"), check_picture(late))}
    assert sizes == {(64, 96)}
    np.testing.assert_array_equal(decode_picture(late), np.rot90(np.asarray(PHOTO), -1))


# ---- depth


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_twelve_bits_in_a_16_bit_png_are_scaled_by_twelve_bits(channels: int) -> None:
    values = np.repeat(RAMP[None, :, None], channels, axis=2)
    if channels in (2, 4):
        values[:, :, -1] = 65535
    for more in ([], [chunk(b"sBIT", bytes([12] * channels))]):
        data = png16(values, *more)
        np.testing.assert_array_equal(decode_picture(data)[0], np.array([STEPS] * 3).T)
        assert check_picture(data).format == "PNG"


@pytest.mark.parametrize(
    ("largest", "white"),
    [
        (200, 255),
        (255, 255),
        (256, 1023),
        (1023, 1023),
        (1024, 4095),
        (4096, 16383),
        (16384, 65535),
        (65535, 65535),
    ],
)
def test_without_a_statement_the_largest_value_decides(largest: int, white: int) -> None:
    values = np.array([[[0], [largest]]], np.uint16)
    expected = round(largest * 255 / white)
    assert decode_picture(png16(values))[0, :, 0].tolist() == [0, expected]
    assert decode_picture(png16(values.repeat(3, axis=2)))[0, :, 1].tolist() == [0, expected]
    assert decode_picture(encoded("TIFF", Image.fromarray(values[:, :, 0])))[0, :, 0].tolist() == [
        0,
        expected,
    ]


def test_sbit_of_a_writer_that_scales_as_png_requires_changes_nothing() -> None:
    full = png16((RAMP * 16)[None, :, None], chunk(b"sBIT", b"\x0c"))
    assert np.abs(decode_picture(full)[0, :, 0].astype(int) - STEPS).max() <= 1
    dark = png16(np.array([[[0], [700]]]), chunk(b"sBIT", b"\x0c"))
    assert decode_picture(dark)[0, :, 0].tolist() == [0, 44]  # 700 of 4,095, not of 1,023


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_twelve_bits_in_16_bit_tiff_colours_are_scaled_by_twelve_bits(
    compression: str | None, byteorder: str
) -> None:
    buffer = io.BytesIO()
    values = np.repeat(RAMP[None, :, None], 3, axis=2).astype(f"{byteorder}u2")
    tifffile.imwrite(buffer, values, photometric="rgb", compression=compression, byteorder=byteorder)
    np.testing.assert_array_equal(decode_picture(buffer.getvalue())[0], np.array([STEPS] * 3).T)


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize(
    "more", [{}, {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}], ids=str
)
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("alpha", [None, "unassalpha", "assocalpha"])
def test_16_bit_tiff_colours_of_every_order_depth_and_alpha(
    planes: str, more: dict[str, Any], byteorder: str, bits: int, alpha: str | None
) -> None:
    full = (1 << bits) - 1
    ramp = np.linspace(0, full, 64).astype(np.int64)
    colours = np.stack([ramp, ramp[::-1], np.full_like(ramp, full)], -1)[None].repeat(40, axis=0)
    alphas = np.full((40, 64, 1), full)
    alphas[1], alphas[2] = full // 2, 0
    values, expected = colours, colours * 255 / full
    if alpha is not None:
        stored = colours * alphas // full if alpha == "assocalpha" else colours
        values = np.concatenate([stored, alphas], axis=2)
        expected = (colours * alphas / full + full - alphas) * 255 / full
    if planes == "separate":
        values = np.moveaxis(values, -1, 0)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        np.ascontiguousarray(values).astype(f"{byteorder}u2"),
        photometric="rgb",
        planarconfig=planes,
        byteorder=byteorder,
        extrasamples=() if alpha is None else (alpha,),
        rowsperstrip=None if "tile" in more else 7,
        **more,
    )
    assert np.abs(decode_picture(buffer.getvalue()) - expected).max() < 1


def test_planes_of_other_depths_and_in_a_big_tiff_are_refused_by_name() -> None:
    values = np.zeros((3, 8, 8), np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="rgb", planarconfig="separate", bigtiff=True)
    with pytest.raises(BadPicture, match="colours of more than 8 bits in separate planes; convert it to 8"):
        decode_picture(buffer.getvalue())


@pytest.mark.parametrize("largest", [4095, 65535])
@pytest.mark.parametrize("stated", [4095, 65535])
def test_a_colour_ppm_is_scaled_by_its_header_or_by_its_values_if_that_states_16_bits(
    largest: int, stated: int
) -> None:
    if largest > stated:
        pytest.skip("such values are no PPM")
    ramp = np.linspace(0, largest, 64).astype(np.uint16)
    data = b"P6 64 1 %d\n" % stated + np.stack([ramp] * 3, axis=-1).astype(">u2").tobytes()
    expected = np.linspace(0, 255, 64)
    assert np.abs(decode_picture(data)[0] - expected[:, None]).max() <= 1
    with pytest.raises(BadPicture):
        decode_picture(data[:-1])


def test_libtiff_writes_nothing_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), compression="zlib"
    )
    data = bytearray(buffer.getvalue())
    data[-400:] = b"\xff" * 400
    lzw = bytearray(encoded("TIFF", compression="tiff_lzw"))
    lzw[20:60] = b"\xff" * 40
    for damaged in (bytes(data), bytes(lzw)):
        with pytest.raises(BadPicture) as refused:
            check_picture(damaged)
        assert refused.value.reason == "corrupt"
    assert capfd.readouterr() == ("", "")


def test_the_transparent_colour_of_a_16_bit_png_is_compared_in_16_bits() -> None:
    values = np.array([[[4095, 0, 0], [4094, 0, 0]]], np.uint16)
    data = png16(values, chunk(b"tRNS", struct.pack(">HHH", 4095, 0, 0)))
    assert decode_picture(data, (1, 2, 3))[0].tolist() == [[1, 2, 3], [255, 0, 0]]


def test_a_grey_header_that_states_its_depth_is_believed() -> None:
    dark = np.array([0, 100], ">u2").tobytes()
    assert decode_picture(b"P5 2 1 4095\n" + dark)[0, :, 0].tolist() == [0, 6]
    assert decode_picture(b"P5 2 1 65535\n" + dark)[0, :, 0].tolist() == [0, 100]
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.array([[0, 700]], np.uint16), extratags=[(281, 3, 1, 4095, True)])
    assert decode_picture(buffer.getvalue())[0, :, 0].tolist() == [0, 44]


def test_white_is_zero_also_with_16_bits() -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, RAMP[None], photometric="miniswhite")
    assert decode_picture(buffer.getvalue())[0, :, 0].tolist() == STEPS[::-1]


def test_floating_point_values_are_colours_from_0_to_1_only() -> None:
    shares = np.linspace(0, 1, 16, dtype=np.float32)[None]
    assert decode_picture(encoded("TIFF", Image.fromarray(shares)))[0, :, 0].tolist() == STEPS
    for values in (shares * 2, shares - 0.5, np.full((1, 2), np.nan, np.float32)):
        reason, detail = refusal(encoded("TIFF", Image.fromarray(values)))
        assert reason == "format"
        assert detail.startswith("floating-point values from ")
        assert detail.endswith(", wanted 0 to 1; convert it to 8 or 16 bits")


def test_values_and_colours_that_cannot_be_shown_are_refused_by_name() -> None:
    deep = encoded("TIFF", Image.fromarray(np.array([[0, 70_000]], np.int32)))
    assert refusal(deep) == (
        "format",
        "values below 0 or above 65,535 are no colours; convert it to 8 or 16 bits",
    )
    lab = encoded("TIFF", Image.new("LAB", (4, 4)))
    assert refusal(lab) == ("format", "LAB colours are not decoded; convert it to RGB")
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        np.zeros((4, 4, 3), np.uint8),
        photometric="rgb",
        extratags=[(50706, 1, 4, (1, 4, 0, 0), True)],
    )
    assert refusal(buffer.getvalue())[1].startswith("raw pictures of cameras are not decoded; ")


def test_without_pillow_heif_the_refusal_of_heic_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    reason, detail = refusal(heic)
    assert reason == "format"
    assert detail == 'HEIC needs pillow-heif: pip install -e ".[heif]" in your clone of uniemox-dist'


def test_heic_is_decoded_upright_with_pillow_heif() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(PHOTO).save(buffer, quality=95)
    data = buffer.getvalue()
    assert np.abs(decode_picture(data).astype(int) - np.asarray(PHOTO)).mean() < 4
    assert check_picture(data, check="header").format == "HEIF"
    stored = reencode(data)
    assert stored.extension == "webp"
    np.testing.assert_array_equal(decode_picture(stored.data), decode_picture(data))
    assert refusal(data[: len(data) * 6 // 10])[0] == "corrupt"


# ---- incomplete files


@pytest.mark.parametrize("name", VARIANTS)
def test_every_format_truncated_at_60_percent_is_refused(name: str) -> None:
    reason, detail = refusal(VARIANTS[name][: len(VARIANTS[name]) * 6 // 10])
    assert reason == "corrupt"
    assert detail
    assert "\n" not in detail


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg grey", "jpeg cmyk", "jpeg restarts"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_a_truncated_jpeg_with_an_end_marker_is_refused(name: str, share: float) -> None:
    data = VARIANTS[name]
    reason, detail = refusal(data[: int(len(data) * share)] + b"\xff\xd9")
    assert reason == "corrupt"
    assert detail.startswith(("the JPEG is truncated", "the JPEG is damaged"))


def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused() -> None:
    data = encoded("JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 4
    for at in scans[1:]:
        cut = data[: data.rindex(b"\xff\xc4", 0, at)] + b"\xff\xd9"  # scans follow their Huffman table
        assert refusal(cut)[1].startswith("the JPEG is truncated after ")
    Image.open(io.BytesIO(cut)).load()  # Pillow notices nothing


def with_app(data: bytes, marker: int, content: bytes) -> bytes:
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


ODD_JPEGS = {
    "unknown JFIF version": encoded("JPEG").replace(b"JFIF\0\1", b"JFIF\0\7"),
    "unknown colour transform": with_app(encoded("JPEG"), 0xEE, b"Adobe\0\x64\0\0\0\0\7"),
    "bytes between segments": encoded("JPEG").replace(b"\xff\xdb", b"junk!\xff\xdb", 1),
    "bad ICC profile": with_app(encoded("JPEG"), 0xE2, b"ICC_PROFILE\0\5\1abc"),
    "scan parameters": encoded("JPEG").replace(b"\1\0\2\x11\3\x11\0\x3f\0", b"\1\0\2\x11\3\x11\0\0\0"),
    "bytes behind the end": encoded("JPEG") + b"motion photo" * 50,
}


def test_an_unknown_colour_transform_of_a_cmyk_jpeg_is_left_to_pillow() -> None:
    data = bytearray(VARIANTS["jpeg cmyk"])
    data[data.index(b"Adobe") + 11] = 1
    with Image.open(io.BytesIO(bytes(data))) as plain:
        expected = np.asarray(plain.convert("RGB"))
    check_picture(bytes(data))
    np.testing.assert_array_equal(decode_picture(bytes(data)), expected)


@pytest.mark.parametrize("name", ODD_JPEGS)
def test_odd_metadata_of_a_jpeg_do_not_matter_and_hide_no_damage(name: str) -> None:
    data = ODD_JPEGS[name]
    assert data != encoded("JPEG")
    check_picture(data)
    np.testing.assert_array_equal(decode_picture(data), decode_picture(encoded("JPEG")))
    whole = data[: data.rindex(b"\xff\xd9")]
    assert refusal(whole[: len(whole) * 7 // 10] + b"\xff\xd9")[0] == "corrupt"


def test_a_png_whose_compressed_data_end_early_is_refused() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 30, 8, 0, 0, 0, 0))
    rows = (b"\0" + b"\x80" * 40) * 30
    whole, half, black = (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
        for content in (rows, rows[: 41 * 15], bytes(41 * 30))
    )
    assert decode_picture(whole).mean() == 128
    assert decode_picture(black).max() == 0
    assert refusal(half) == ("corrupt", "the PNG is truncated: its compressed data end before the last row")
    interlaced = encoded("PNG", Image.new("L", (13, 11)))
    assert decode_picture(interlaced).shape == (11, 13, 3)


def test_a_tiff_that_lacks_strips_is_refused() -> None:
    data = bytearray(encoded("TIFF"))
    (at,) = struct.unpack_from("<I", data, 4)
    for entry in range(struct.unpack_from("<H", data, at)[0]):
        if struct.unpack_from("<H", data, at + 2 + 12 * entry)[0] == 257:
            struct.pack_into("<H", data, at + 10 + 12 * entry, 128)
    assert refusal(bytes(data))[0] == "corrupt"


# ---- hostile files


def test_many_scans_are_refused() -> None:
    data = encoded("JPEG", progressive=True)
    at = data.index(b"\xff\xda")
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    scan = data[at:end]
    bomb = data[:at] + scan * 600 + data[end:]
    assert refusal(bomb) == ("corrupt", "the JPEG has more than 500 scans")


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_headers_that_promise_too_many_pixels_are_refused(form: str) -> None:
    side = 60_000
    data = bytearray(encoded(form, no_jp2=True) if form == "JPEG2000" else encoded(form))
    if form == "GIF":
        struct.pack_into("<HH", data, 6, side, side)
    elif form == "BMP":
        struct.pack_into("<ii", data, 18, side, side)
    elif form == "PPM":
        data[:] = b"P6 %d %d 255\n" % (side, side) + bytes(100)
    elif form == "JPEG2000":
        struct.pack_into(">II", data, 8, side, side)
    else:
        (at,) = struct.unpack_from("<I", data, 4)
        for entry in range(struct.unpack_from("<H", data, at)[0]):
            if struct.unpack_from("<H", data, at + 2 + 12 * entry)[0] in (256, 257):
                struct.pack_into("<HHII", data, at + 2 + 12 * entry, 256 + entry, 4, 1, side)
    reason, detail = refusal(bytes(data))
    assert (reason, str(178_956_970) in detail) == ("too_large", True)


def test_the_header_reader_tells_colours_and_further_pictures() -> None:
    assert read_jpeg_header(VARIANTS["jpeg cmyk"]) == (96, 64, 1, 4, False)
    assert read_jpeg_header(VARIANTS["jpeg grey"]) == (96, 64, 1, 1, False)
    assert read_jpeg_header(VARIANTS["mpo"]) == (96, 64, 1, 3, True)
