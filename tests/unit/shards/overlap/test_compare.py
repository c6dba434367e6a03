"""Which pairs of pictures are near-copies, and of which kind."""

import io
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from skimage import data

from shards.overlap.compare import NearCopy, compare, prepare
from shards.pictures.formats import BadPicture
from tests.support.inputs import DEMO


def encode(picture: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def photo(name: str = "astronaut") -> Image.Image:
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def related(first: bytes, second: bytes) -> NearCopy | None:
    forward, backward = compare(prepare(first), prepare(second)), compare(prepare(second), prepare(first))
    assert (forward is None) == (backward is None)
    return forward


def captioned(picture: Image.Image) -> Image.Image:
    out = Image.new("RGB", (picture.width, picture.height + 80), (255, 255, 255))
    out.paste(picture, (0, 80))
    ImageDraw.Draw(out).text((10, 20), "when the build is green", fill=(0, 0, 0), font_size=36)
    return out


EDITS: list[tuple[str, Callable[[Image.Image], Image.Image]]] = [
    ("reencoded", lambda p: Image.open(io.BytesIO(encode(p, "JPEG", quality=30)))),
    ("reencoded", lambda p: Image.open(io.BytesIO(encode(p, "WEBP", quality=60))).convert("RGB")),
    ("reencoded", lambda p: p.convert("L").convert("RGB")),
    ("reencoded", lambda p: ImageEnhance.Brightness(p).enhance(0.7)),
    ("resized", lambda p: p.resize((p.width // 4, p.height // 4))),
    ("resized", lambda p: p.resize((p.width * 2, p.height * 2))),
    ("resized", lambda p: p.resize((224, 160))),
    ("mirrored", ImageOps.mirror),
    ("cropped", lambda p: p.crop((0, 0, round(0.95 * p.width), round(0.95 * p.height)))),
    (
        "cropped",
        lambda p: p.crop((round(0.1 * p.width), round(0.03 * p.height), p.width, round(0.93 * p.height))),
    ),
    ("bordered", lambda p: ImageOps.expand(p, 30, (0, 0, 0))),
    ("bordered", captioned),
    ("mirrored+cropped", lambda p: ImageOps.mirror(p.crop((40, 0, p.width, p.height - 20)))),
]


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
@pytest.mark.parametrize(("kind", "edit"), EDITS)
def test_a_changed_copy_is_found_with_its_kind(
    name: str, kind: str, edit: Callable[[Image.Image], Image.Image]
) -> None:
    original = photo(name)
    found = related(encode(original, quality=92), encode(edit(original), quality=85))
    assert found is not None
    assert found.kind == kind
    assert found.score > 0.85


def test_equal_bytes_and_equal_pixels_are_told_apart() -> None:
    picture = photo("coffee")
    assert related(encode(picture), encode(picture)) == NearCopy("bytes", 1.0, 0.0)
    assert related(encode(picture, "PNG"), encode(picture, "WEBP", lossless=True)) == NearCopy(
        "pixels", 1.0, 0.0
    )


def test_different_photographs_do_not_match() -> None:
    names = ("astronaut", "chelsea", "coffee", "camera", "rocket")
    pictures = [encode(photo(name)) for name in names]
    assert not [
        (a, b)
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j and related(pictures[i], pictures[j])
    ]


def plain(seed: int) -> Image.Image:
    return Image.new("RGB", (200, 150), (seed, 200, 90))


def gradient(seed: int) -> Image.Image:
    values = np.linspace(seed, 200 + seed, 200).astype(np.uint8)
    return Image.fromarray(np.repeat(np.tile(values, (150, 1))[..., None], 3, 2))


def clock(hour: int) -> Image.Image:
    out = Image.new("RGB", (200, 200), (255, 255, 255))
    draw = ImageDraw.Draw(out)
    draw.ellipse((20, 20, 180, 180), outline=(0, 0, 0), width=8)
    angle = hour * np.pi / 6
    draw.line((100, 100, 100 + 60 * np.sin(angle), 100 - 60 * np.cos(angle)), fill=(200, 0, 0), width=8)
    return out


@pytest.mark.parametrize("make", [plain, gradient, clock])
def test_pictures_that_are_only_alike_do_not_match(make: Callable[[int], Image.Image]) -> None:
    assert related(encode(make(2), "PNG"), encode(make(5), "PNG")) is None


def test_emoji_in_other_skin_colours_do_not_match() -> None:
    table = pq.read_table(DEMO, columns=["image", "key"]).to_pylist()
    families: dict[str, list[bytes]] = {}
    for row in table:
        base = "-".join(part for part in row["key"].split("-") if not part.startswith("1f3f"))
        families.setdefault(base, []).append(row["image"])
    variants = [images[:2] for images in families.values() if len(images) > 1][:12]
    assert variants
    assert not [1 for first, second in variants if related(first, second)]


def test_a_damaged_picture_is_refused_as_everywhere() -> None:
    with pytest.raises(BadPicture):
        prepare(encode(photo())[:5000])
