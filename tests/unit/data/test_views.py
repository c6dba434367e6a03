"""Encoded pictures become upright views in the right colours, with crops at the right positions."""

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage import data
from torch import Tensor
from torch.nn.functional import interpolate

from shards.detect.types import Person
from shards.pictures.decode import decode_picture
from uniemox_dist.data.crops import (
    Box,
    View,
    ViewSettings,
    choose_background,
    choose_person,
    choose_scene_box,
    grow_person_box,
    plan_training_views,
)
from uniemox_dist.data.rng import Purpose, uniform
from uniemox_dist.data.views import (
    crop_and_resize,
    decode_tensor,
    evaluation_views,
    render_view,
    resize_whole,
    training_views,
)

ASTRONAUT = np.asarray(Image.fromarray(data.astronaut()).resize((192, 128)))
RED, GREY = (220, 20, 40), (128, 128, 128)
PLAIN = ViewSettings(image_size=32, flip=False, person_margin=0.0)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def with_rectangle(width: int, height: int, left: int, top: int, right: int, bottom: int) -> bytes:
    """A grey PNG with a red rectangle."""
    picture = Image.new("RGB", (width, height), GREY)
    picture.paste(RED, (left, top, right, bottom))
    return encoded(picture)


def pixels(rgb_3HW: Tensor) -> np.ndarray:
    return rgb_3HW.permute(1, 2, 0).numpy()


def distance(a: Any, b: Any) -> float:
    """Mean absolute difference, grey levels."""
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


# ---- decoding


# Orientation -> how a picture is stored so that it is upright when shown (EXIF 2.3, tag 0x0112).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_picture_is_decoded_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](ASTRONAUT)))
    file = encoded(stored, form, exif=exif, **({"quality": 95} if form != "PNG" else {}))
    rgb = pixels(decode_tensor(file))
    assert rgb.shape == ASTRONAUT.shape
    assert distance(rgb, ASTRONAUT) <= (0 if form == "PNG" else 4)
    assert distance(rgb, decode_picture(file)) < 1  # packing measured and looked for persons in the same


def test_packing_and_training_agree_on_a_turn_that_only_xmp_states() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    exif = Image.Exif()
    exif[0x010F] = "a camera's maker, and no orientation"
    files = [
        encoded(Image.fromarray(ASTRONAUT), form, xmp=xmp, **more)
        for form in ("JPEG", "WEBP")
        for more in ({}, {"exif": exif})
    ]
    start = files[1].index(b"\xff\xe0")  # cameras write no JFIF header, and then Pillow reads EXIF early
    files.append(files[1][:start] + files[1][start + 18 :])
    for file in files:
        assert b"tiff:Orientation" in file
        assert pixels(decode_tensor(file)).shape == decode_picture(file).shape == (128, 192, 3)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparent_pixels_show_the_background(form: str) -> None:
    rgba = np.zeros((8, 12, 4), np.uint8)
    rgba[:, 4:8] = (*RED, 255)
    rgba[:, 8:] = (*RED, 51)  # one fifth of red
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    file = encoded(Image.fromarray(rgba), form, **options)
    for background in ((255, 255, 255), (10, 200, 30)):
        rgb = pixels(decode_tensor(file, background))
        assert (rgb[:, :4] == background).all()
        assert (rgb[:, 4:8] == RED).all()
        mixed = 0.2 * np.array(RED) + 0.8 * np.array(background)
        assert np.abs(rgb[:, 8:] - mixed).max() <= 1
    assert (decode_picture(file) == pixels(decode_tensor(file))).all()


def test_a_palette_png_with_transparency_shows_its_colours_and_the_background() -> None:
    picture = Image.new("P", (6, 4), 0)
    picture.putpalette([0, 0, 0, *RED, 0, 0, 255])
    picture.paste(1, (2, 0, 4, 4))
    picture.paste(2, (4, 0, 6, 4))
    rgb = pixels(decode_tensor(encoded(picture, transparency=0), (9, 8, 7)))
    assert [tuple(rgb[0, x]) for x in (0, 2, 4)] == [(9, 8, 7), RED, (0, 0, 255)]


def test_a_16_bit_grey_png_keeps_its_shades() -> None:
    values = np.linspace(0, 65535, 256 * 4).round().astype(np.uint16).reshape(4, 256)
    file = encoded(Image.fromarray(values))
    expected = np.repeat((values / 257).round().astype(int)[:, :, None], 3, axis=2)
    assert np.abs(pixels(decode_tensor(file)) - expected).max() <= 1
    np.testing.assert_array_equal(decode_picture(file), pixels(decode_tensor(file)))
    clear = decode_tensor(encoded(Image.fromarray(values), transparency=int(values[0, 0])), (1, 2, 3))
    assert pixels(clear)[0, 0].tolist() == [1, 2, 3]
    assert np.abs(pixels(clear)[0, 1:] - expected[0, 1:]).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_pictures_become_rgb(mode: str) -> None:
    picture = Image.new("L", (4, 4), 0)
    picture.paste(255, (2, 0, 4, 4))
    rgb = pixels(decode_tensor(encoded(picture.convert(mode))))
    assert (rgb[:, :2] == 0).all()
    assert (rgb[:, 2:] == 255).all()


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    file = encoded(Image.fromarray(ASTRONAUT).convert("CMYK"), "JPEG", quality=95)
    rgb = pixels(decode_tensor(file))
    assert distance(rgb, ASTRONAUT) < 3
    assert distance(rgb, decode_picture(file)) < 1


def test_a_grey_jpeg_becomes_rgb() -> None:
    grey = Image.fromarray(ASTRONAUT).convert("L")
    rgb = pixels(decode_tensor(encoded(grey, "JPEG", quality=95)))
    assert distance(rgb, np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)) < 3


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_cut_or_foreign_file_is_a_value_error(share: float) -> None:
    for form in ("JPEG", "PNG", "WEBP"):
        file = encoded(Image.fromarray(ASTRONAUT), form)
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode_tensor(file[: int(len(file) * share)])
    with pytest.raises(ValueError, match="cannot be decoded: not a picture of a known format"):
        decode_tensor(b"text")


# ---- cutting


def test_a_resize_is_pillows_antialiased_bicubic_within_a_grey_level() -> None:
    photo = Image.fromarray(data.astronaut())
    rgb = torch.from_numpy(data.astronaut()).permute(2, 0, 1)
    for box, size in (((0, 0, 512, 512), 96), ((100, 30, 301, 157), 224), ((7, 300, 64, 200), 96)):
        left, top, width, height = box
        crop = photo.crop((left, top, left + width, top + height))
        expected = crop.resize((size, size), Image.Resampling.BICUBIC)
        view = crop_and_resize(rgb, box, size)
        assert (view.shape, view.dtype) == ((3, size, size), torch.uint8)
        assert distance(pixels(view), expected) < 1


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_views_are_the_crops_resized_by_torchs_antialiased_filter(resize: str) -> None:
    """Bit for bit, mirrored or not; bicubic is the default."""
    file = encoded(Image.fromarray(ASTRONAUT))
    rgb = decode_tensor(file)

    def expected(box: Box, mirror: bool) -> Tensor:
        left, top, width, height = box
        crop = rgb[:, top : top + height, left : left + width].contiguous()[None]
        view = interpolate(crop, (48, 48), mode=resize, antialias=True)[0]
        return view.flip(-1) if mirror else view

    settings = ViewSettings(image_size=48, resize=resize)
    assert (ViewSettings(image_size=48) == settings) == (resize == "bicubic")
    mirrors = set()
    for slot in range(20):
        scene, person = training_views(file, (), settings, 9, slot)
        plan = plan_training_views(192, 128, (), settings, 9, slot)
        assert plan.person is not None
        assert person is not None
        mirrors |= {plan.scene.mirror, plan.person.mirror}
        assert torch.equal(scene, expected(plan.scene.box, plan.scene.mirror))
        assert torch.equal(person, expected(plan.person.box, plan.person.mirror))
    assert mirrors == {False, True}


def test_a_mirrored_view_is_the_exact_mirror() -> None:
    rgb = torch.from_numpy(ASTRONAUT.copy()).permute(2, 0, 1)
    for box in ((0, 0, 192, 128), (13, 7, 101, 99)):
        assert torch.equal(
            render_view(rgb, View(box, mirror=True), 48), render_view(rgb, View(box), 48).flip(-1)
        )


def test_the_whole_picture_is_resized_without_cropping() -> None:
    file = with_rectangle(90, 30, 0, 0, 30, 30)
    rgb = pixels(resize_whole(decode_tensor(file), 30))
    assert (rgb[:, :7] == RED).all()
    assert (rgb[:, 13:] == GREY).all()


# ---- the scene


@pytest.mark.parametrize("size", [(160, 160), (500, 333), (333, 500), (640, 360), (360, 640), (97, 101)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.2, 0.3), (0.4, 0.4)])
def test_the_scene_lies_inside_the_picture_with_an_area_and_shape_in_range(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    width, height = size
    settings = ViewSettings(scene_scale=scale)
    shares = []
    for slot in range(500):
        left, top, w, h = choose_scene_box(width, height, settings, 1, slot)
        assert left >= 0
        assert top >= 0
        assert left + w <= width
        assert top + h <= height
        assert 3 / 4 * 0.97 < w / h < 4 / 3 * 1.03  # whole pixels
        shares.append(w * h / (width * height))
    assert scale[0] - 0.02 < min(shares)
    assert max(shares) < scale[1] + 0.02
    if scale == (0.2, 1.0) and size == (160, 160):
        assert min(shares) < 0.22
        assert max(shares) > 0.9


@pytest.mark.parametrize("size", [(2000, 100), (100, 2000)])
def test_a_panorama_gives_a_crop_of_its_whole_shorter_side(size: tuple[int, int]) -> None:
    for slot in range(200):
        left, top, w, h = choose_scene_box(*size, ViewSettings(scene_scale=(0.5, 1.0)), 1, slot)
        assert 100 in (w, h)
        assert 74 <= min(w, h) <= max(w, h) <= 134
        assert 0 <= left <= size[0] - w
        assert 0 <= top <= size[1] - h


def test_the_scene_reaches_every_corner_of_the_picture() -> None:
    boxes = [
        choose_scene_box(200, 100, ViewSettings(scene_scale=(0.2, 0.5)), 1, slot) for slot in range(2000)
    ]
    assert min(left for left, *_ in boxes) == min(top for _, top, *_ in boxes) == 0
    assert max(left + w for left, _, w, _ in boxes) == 200
    assert max(top + h for _, top, _, h in boxes) == 100


def test_a_picture_of_one_pixel_has_views() -> None:
    scene, person = training_views(encoded(Image.new("RGB", (1, 1), RED)), (), PLAIN, 0, 0)
    assert person is not None
    assert (pixels(scene) == RED).all()
    assert (pixels(person) == RED).all()


def test_the_scene_view_is_the_cut_of_its_box_for_the_slot() -> None:
    file = encoded(Image.fromarray(ASTRONAUT))
    settings = ViewSettings(image_size=48)
    flips = Counter()
    for slot in range(60):
        scene, person = training_views(file, (), settings, 9, slot)
        rgb = decode_tensor(file)
        flipped = uniform(9, slot, Purpose.SCENE_FLIP) < 0.5
        flips[flipped] += 1
        assert torch.equal(
            scene, render_view(rgb, View(choose_scene_box(192, 128, settings, 9, slot), flipped), 48)
        )
        flipped = uniform(9, slot, Purpose.PERSON_FLIP) < 0.5
        assert person is not None
        assert torch.equal(person, render_view(rgb, View((0, 0, 192, 128), flipped), 48))
    assert 15 < flips[True] < 45


def test_the_views_of_a_slot_keep_their_values() -> None:
    settings = ViewSettings(image_size=8)
    boxes = [choose_scene_box(640, 480, settings, 5, slot) for slot in (0, 1, 10**9)]
    assert boxes == [(52, 0, 494, 480), (78, 1, 543, 478), (170, 0, 413, 480)]
    assert choose_background(ViewSettings(background="random"), 5, 1) == (173, 228, 100)


# ---- the person


@pytest.mark.parametrize("box", [(20, 10, 60, 90), (0, 0, 40, 40), (60, 50, 100, 100), (0, 0, 100, 100)])
def test_the_person_view_is_the_crop_of_the_person(box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    person = Person((left / 100, top / 100, right / 100, bottom / 100), 0.9)
    _, view = training_views(with_rectangle(100, 100, *box), (person,), PLAIN, 0, 0)
    assert view is not None
    assert (pixels(view) == RED).all()  # all of the rectangle, and nothing around it
    # One pixel less of rectangle on each side makes a visible difference.
    smaller = with_rectangle(100, 100, left + 1, top + 1, right - 1, bottom - 1)
    _, view = training_views(smaller, (person,), PLAIN, 0, 0)
    assert view is not None
    edges = pixels(view)[[0, -1, 16, 16], [16, 16, 0, -1]]
    assert (np.abs(edges.astype(int) - RED).max(1) > 20).all()


def test_the_margin_is_a_share_of_the_longer_side_on_every_side() -> None:
    assert grow_person_box(1000, 500, Person((0.4, 0.2, 0.5, 0.6), 1.0), 0.25) == (350, 50, 200, 300)
    assert grow_person_box(1000, 500, Person((0.4, 0.2, 0.5, 0.6), 1.0), 0.0) == (400, 100, 100, 200)


def test_the_margin_is_clipped_at_the_edges_of_the_picture() -> None:
    assert grow_person_box(100, 100, Person((0.0, 0.5, 0.2, 1.0), 1.0), 0.2) == (0, 40, 30, 60)
    assert grow_person_box(100, 100, Person((0.9, 0.0, 1.0, 0.4), 1.0), 0.5) == (70, 0, 30, 60)
    assert grow_person_box(100, 100, Person((0.1, 0.1, 0.9, 0.9), 1.0), 2.0) == (0, 0, 100, 100)


@pytest.mark.parametrize("corner", [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.3, 1.0), (0.3, 0.3)])
def test_a_box_without_area_is_a_pixel_inside_the_picture(corner: tuple[float, float]) -> None:
    x, y = corner
    left, top, width, height = grow_person_box(50, 40, Person((x, y, x, y), 1.0), 0.15)
    assert 0 <= left < left + width <= 50
    assert 0 <= top < top + height <= 40
    _, view = training_views(
        encoded(Image.new("RGB", (50, 40), RED)), (Person((x, y, x, y), 1.0),), PLAIN, 0, 0
    )
    assert view is not None
    assert (pixels(view) == RED).all()


def test_without_a_person_the_view_is_the_whole_picture() -> None:
    file = encoded(Image.fromarray(ASTRONAUT))
    _, view = training_views(file, (), PLAIN, 0, 0)
    assert view is not None
    assert torch.equal(view, resize_whole(decode_tensor(file), 32))
    assert grow_person_box(192, 128, None, 0.15) == (0, 0, 192, 128)


def test_without_a_person_branch_there_is_no_view() -> None:
    assert (
        training_views(encoded(Image.fromarray(ASTRONAUT)), (), ViewSettings(with_person=False), 0, 0)[1]
        is None
    )


SMALL_SURE = Person((0.0, 0.0, 0.2, 0.2), 0.95)
LARGE = Person((0.5, 0.0, 1.0, 0.8), 0.6)
AS_LARGE_BUT_SURER = Person((0.0, 0.2, 0.5, 1.0), 0.7)


def test_the_largest_or_most_confident_person_is_chosen() -> None:
    persons = (SMALL_SURE, LARGE, AS_LARGE_BUT_SURER)
    assert choose_person(persons[:2], "largest", 0, 0) == LARGE
    assert choose_person(persons, "largest", 0, 0) == AS_LARGE_BUT_SURER
    assert choose_person(persons, "most_confident", 0, 0) == SMALL_SURE
    twins = (Person((0, 0, 0.5, 0.5), 0.5), Person((0.5, 0.5, 1, 1), 0.5))
    assert choose_person(twins, "largest", 0, 0) is twins[0]
    assert choose_person((), "largest", 0, 0) is None


def test_a_random_person_is_drawn_by_slot_and_equally_often() -> None:
    persons = (SMALL_SURE, LARGE, AS_LARGE_BUT_SURER)
    chosen = [choose_person(persons, "random", 3, slot) for slot in range(3000)]
    assert chosen == [choose_person(persons, "random", 3, slot) for slot in range(3000)]
    assert all(abs(count - 1000) < 4 * 26 for count in Counter(chosen[i].score for i in range(3000)).values())  # type: ignore[union-attr]


def test_the_chosen_person_is_the_one_that_is_shown() -> None:
    picture = Image.new("RGB", (100, 100), GREY)
    picture.paste((0, 0, 255), (0, 0, 20, 20))
    picture.paste(RED, (50, 0, 100, 80))
    for how, colour in (("largest", RED), ("most_confident", (0, 0, 255))):
        settings = ViewSettings(image_size=16, flip=False, person=how, person_margin=0.0)
        _, view = training_views(encoded(picture), (SMALL_SURE, LARGE), settings, 0, 0)
        assert view is not None
        assert (pixels(view) == colour).all()


# ---- backgrounds and evaluation


def test_a_random_background_is_one_colour_per_slot_behind_both_views() -> None:
    file = encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0)))
    settings = ViewSettings(image_size=8, background="random")
    colours = set()
    for slot in range(50):
        scene, person = training_views(file, (), settings, 4, slot)
        assert person is not None
        colour = choose_background(settings, 4, slot)
        assert (pixels(scene) == colour).all()
        assert (pixels(person) == colour).all()
        colours.add(colour)
    assert len(colours) == 50
    assert choose_background(ViewSettings(), 4, 0) == (255, 255, 255)


def test_evaluation_views_are_the_picture_and_the_person_on_white_without_randomness() -> None:
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[10:30, 10:30] = (*RED, 255)
    person = Person((0.25, 0.25, 0.75, 0.75), 0.9)
    settings = ViewSettings(
        image_size=40, background="random", person="random", person_margin=0.0, resize="bilinear"
    )
    scene, view = evaluation_views(encoded(Image.fromarray(rgba)), (person, SMALL_SURE), settings)
    assert np.array_equal(pixels(scene)[10:30, 10:30], np.broadcast_to(RED, (20, 20, 3)))
    assert (pixels(scene)[:9] == 255).all()
    surest = grow_person_box(40, 40, SMALL_SURE, 0.0)
    assert torch.equal(view, crop_and_resize(decode_tensor(encoded(Image.fromarray(rgba))), surest, 40))


def test_pillow_agrees_that_the_fixture_files_are_turned() -> None:
    """Guards STORED itself: Pillow's own transposition must undo it, too."""
    for orientation, stored in STORED.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        file = encoded(Image.fromarray(np.ascontiguousarray(stored(ASTRONAUT))), "PNG", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
        assert distance(upright, ASTRONAUT) == 0
