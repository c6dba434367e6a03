"""Reduced decodes show the same views as full ones, and colour factors depend on the slot."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from shards.detect.types import Person
from shards.pictures.decode import decode_scaled
from uniemox_dist.data.crops import (
    DENSITY,
    View,
    ViewSettings,
    find_person_patches,
    plan_evaluation_views,
    plan_training_views,
    plan_views,
    scale_box,
)
from uniemox_dist.data.views import allocate_views, render, render_view, training_views

SIZE = 224
WHITE = (255, 255, 255)


def jpeg(picture: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def photo(width: int, height: int, name: str = "rocket") -> Image.Image:
    """A photograph, its own pixels repeated as mirror images around it: no enlarging, so that it stays sharp."""
    pixels = getattr(data, name)()
    across, down = -(-width // pixels.shape[1]), -(-height // pixels.shape[0])
    rows = [
        np.concatenate([pixels[:: (-1) ** y, :: (-1) ** x] for x in range(across)], axis=1)
        for y in range(down)
    ]
    return Image.fromarray(np.concatenate(rows)[:height, :width])


def views(file: bytes, width: int, height: int, scale: int, boxes: list[View]) -> list[Tensor]:
    """The views of a picture decoded at 1/scale."""
    array, found = decode_scaled(file, WHITE, scale)
    assert found == scale
    assert array.shape[:2] == (-(-height // scale), -(-width // scale))
    return [render_view(torch.from_numpy(array).permute(2, 0, 1), view, SIZE, scale) for view in boxes]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.int() - b.int()).abs().float().mean())


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_a_smaller_decode_shows_the_same_within_a_grey_level(name: str) -> None:
    width, height = 2003, 1501  # sides that no scale divides
    file = jpeg(photo(width, height, name))
    settings = ViewSettings(scene_scale=(0.5, 1.0))
    scales, distances = set(), []
    for slot in range(12):
        persons = (Person((0.1, 0.05, 0.8, 0.98), 0.9),) if slot % 2 else ()
        plan = plan_training_views(width, height, persons, settings, 1, slot)
        assert plan.person is not None
        scales.add(plan.scale)
        both = [plan.scene, plan.person]
        small = views(file, width, height, plan.scale, both)
        whole = views(file, width, height, 1, both)
        distances += [distance(a, b) for a, b in zip(small, whole)]
    assert scales == {2}
    assert max(distances) < 1
    assert np.mean(distances) < 0.6


def test_a_view_of_an_unscaled_plan_is_at_most_a_pixel_from_the_drawn_box() -> None:
    """Boxes are moved to whole pixels of the smaller picture, by less than one of those."""
    for slot in range(200):
        drawn = plan_training_views(3001, 2003, (), ViewSettings(image_size=32), 1, slot)
        unscaled = plan_training_views(3001, 2003, (), ViewSettings(image_size=2000), 1, slot)
        assert (drawn.scale, unscaled.scale) == (8, 1)
        for a, b in zip(drawn.scene.box, unscaled.scene.box):
            assert abs(a - b) < 8
        left, top, width, height = drawn.scene.box
        assert tuple(8 * edge for edge in scale_box(drawn.scene.box, 8)) == drawn.scene.box
        assert left + width <= 3001
        assert top + height <= 2003


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_the_scale_keeps_enough_pixels_for_the_smallest_crop(scale: int) -> None:
    side = int(scale * DENSITY * SIZE)
    big, small = View((0, 0, 9000, 8000)), View((16, 24, side, side + 5))
    assert plan_views(big, small, WHITE, SIZE).scale == scale
    if scale > 1:
        smaller = View((16, 24, side - 1, side + 5))
        assert plan_views(big, smaller, WHITE, SIZE).scale == scale // 2


def test_rotated_pictures_and_other_formats_are_decoded_whole_with_the_same_content() -> None:
    picture = photo(1400, 1000)
    whole = View((0, 0, 1400, 1000))
    plan = plan_views(whole, whole, WHITE, SIZE)
    assert plan.scale == 2
    assert plan_evaluation_views(1400, 1000, (), ViewSettings()).scale == 1
    exif = Image.Exif()
    exif[0x112] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(picture))))
    files = [jpeg(picture), jpeg(stored, exif=exif)]
    for form in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        picture.save(buffer, form, quality=95)
        files.append(buffer.getvalue())
    shown = []
    for file in files:
        scene, person = allocate_views(1, SIZE), allocate_views(1, SIZE)
        render(file, (1400, 1000), plan, scene[0], person[0])
        assert torch.equal(scene, person)  # without a person both are the whole picture
        shown.append(scene[0])
    assert decode_scaled(files[1], WHITE, 2)[1] == 1
    for other in shown[1:]:
        assert distance(shown[0], other) < 1.5  # two lossy formats


def test_a_picture_of_another_size_than_stated_is_an_error() -> None:
    plan = plan_evaluation_views(64, 48, (), ViewSettings(image_size=16))
    room = allocate_views(1, 16)
    with pytest.raises(ValueError, match=r"has 48 x 64 pixels where 64 x 48 are stated"):
        render(jpeg(photo(48, 64)), (64, 48), plan, room[0], None)


def test_colour_factors_are_drawn_by_slot_and_view_and_stay_in_range() -> None:
    settings = ViewSettings(colour_jitter=0.4)
    plans = [plan_training_views(100, 80, (), settings, 3, slot) for slot in range(300)]
    assert plans == [plan_training_views(100, 80, (), settings, 3, slot) for slot in range(300)]
    factors = np.array([[p.scene.jitter, p.person.jitter] for p in plans if p.person is not None])
    assert factors.shape == (300, 2, 3)
    assert 0.6 <= factors.min() < 0.62
    assert 1.38 < factors.max() <= 1.4
    assert len(np.unique(factors)) == factors.size
    without = plan_training_views(100, 80, (), ViewSettings(), 3, 7)
    assert without.scene.jitter is None
    assert without.scene.box == plans[7].scene.box  # one more setting moves nothing else


def test_colour_jitter_multiplies_brightness_contrast_and_saturation() -> None:
    grey = jpeg(Image.new("RGB", (40, 40), (100, 100, 100)))
    plain = ViewSettings(image_size=16)
    for slot in range(20):
        plan = plan_training_views(40, 40, (), ViewSettings(image_size=16, colour_jitter=0.5), 0, slot)
        assert plan.scene.jitter is not None
        jittered, _ = training_views(grey, (), ViewSettings(image_size=16, colour_jitter=0.5), 0, slot)
        untouched, _ = training_views(grey, (), plain, 0, slot)
        # A plain grey has no contrast and no colour: only its brightness changes.
        expected = untouched.float() * plan.scene.jitter[0]
        assert float((jittered.float() - expected).abs().max()) < 3  # each factor rounds down once


def test_views_lie_in_memory_as_decoders_write_them() -> None:
    room = allocate_views(3, 8)
    assert room.shape == (3, 3, 8, 8)
    assert room.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mirror", [False, True])
def test_patches_on_the_person_are_those_whose_centre_lies_in_the_box(mirror: bool) -> None:
    person = Person((0.5, 0.25, 1.0, 0.75), 0.9)  # in a picture of 80 x 40: x from 40, y from 10 to 30
    view = View((20, 0, 40, 40), mirror)
    on = np.array(find_person_patches(view, person, 80, 40, 4)).reshape(4, 4)
    expected = np.zeros((4, 4), bool)
    expected[1:3, 2:] = True
    assert (on == (expected[:, ::-1] if mirror else expected)).all()
    assert not any(find_person_patches(view, None, 80, 40, 4))
