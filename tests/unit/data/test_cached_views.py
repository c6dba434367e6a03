"""Cached scenes depend on the picture's content only and are rendered identically beside a new person view."""

import io
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from shards.detect.types import Person
from uniemox_dist.core.files import sha256_bytes
from uniemox_dist.data.crops import (
    ViewPlan,
    ViewSettings,
    plan_cached_scene,
    plan_person_view,
    plan_training_views,
    plan_views,
    plan_with_cached_scene,
)
from uniemox_dist.data.loader import choose_cached_view
from uniemox_dist.data.views import allocate_views, render, render_scenes

SETTINGS = ViewSettings(image_size=32, background="random", colour_jitter=0.3)
SHA = sha256_bytes(b"a picture")


def encoded(form: str, width: int, height: int) -> bytes:
    picture = Image.fromarray(data.astronaut()).resize((width, height))
    if form == "PNG":
        picture.putalpha(Image.fromarray((np.indices((height, width)).sum(0) % 256).astype(np.uint8)))
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def drawn(file: bytes, size: tuple[int, int], plan: ViewPlan) -> list[torch.Tensor]:
    views = allocate_views(2, 32)
    render(file, size, plan, views[0], views[1] if plan.person is not None else None)
    return list(views[: 2 if plan.person is not None else 1])


def test_a_stored_scene_depends_on_seed_content_and_number_alone() -> None:
    plans = [plan_cached_scene(640, 480, SETTINGS, 3, SHA, number) for number in range(4)]
    assert plans == [plan_cached_scene(640, 480, SETTINGS, 3, SHA, number) for number in range(4)]
    # Nothing that concerns the person view matters.
    others = replace(SETTINGS, person="random", person_margin=1.0, person_grid=4)
    assert plans == [plan_cached_scene(640, 480, others, 3, SHA, number) for number in range(4)]
    assert all(plan.person is None and plan.scene.jitter is not None for plan in plans)
    found = {plan.scene for plan in plans}
    found |= {plan_cached_scene(640, 480, SETTINGS, 4, SHA, 0).scene}
    found |= {plan_cached_scene(640, 480, SETTINGS, 3, sha256_bytes(b"another"), 0).scene}
    assert len(found) == 6


def test_stored_scenes_spread_like_those_of_slots() -> None:
    def areas(plans: list[ViewPlan]) -> np.ndarray:
        return np.array([plan.scene.box[2] * plan.scene.box[3] / (640 * 480) for plan in plans])

    stored = [
        plan_cached_scene(640, 480, SETTINGS, 0, sha256_bytes(bytes([i])), k)
        for i in range(100)
        for k in range(8)
    ]
    slots = [plan_training_views(640, 480, (), SETTINGS, 0, slot) for slot in range(800)]
    assert abs(areas(stored).mean() - areas(slots).mean()) < 0.03
    assert 0.4 < np.mean([plan.scene.mirror for plan in stored]) < 0.6


@pytest.mark.parametrize(("form", "size"), [("JPEG", (900, 600)), ("PNG", (120, 90)), ("WEBP", (120, 90))])
def test_several_scenes_from_one_decode_equal_scenes_rendered_singly(
    form: str, size: tuple[int, int]
) -> None:
    file = encoded(form, *size)
    plans = [plan_cached_scene(*size, SETTINGS, 1, SHA, number) for number in range(6)]
    if form == "JPEG":
        assert len({plan.scale for plan in plans}) > 1
    together = allocate_views(6, 32)
    render_scenes(file, size, plans, together)
    for plan, scene in zip(plans, together):
        assert torch.equal(scene, drawn(file, size, plan)[0])


def test_a_picture_of_another_size_than_stated_is_refused() -> None:
    plans = [plan_cached_scene(100, 90, SETTINGS, 1, SHA, 0)]
    with pytest.raises(ValueError, match="has 120 x 90 pixels where 100 x 90 are stated"):
        render_scenes(encoded("PNG", 120, 90), (100, 90), plans, allocate_views(1, 32))


SMALL, LARGE = Person((0.5, 0.5, 0.52, 0.53), 0.9), Person((0.1, 0.1, 0.9, 0.9), 0.9)


@pytest.mark.parametrize("persons", [(), (SMALL,), (LARGE,)], ids=["nobody", "small", "large"])
def test_a_replayed_scene_has_its_stored_pixels_for_any_person(persons: Any) -> None:
    size = (1600, 1200)
    file = encoded("JPEG", *size)
    for slot in range(6):
        stored = plan_cached_scene(*size, SETTINGS, 5, SHA, slot)
        plan = plan_with_cached_scene(stored, *size, persons, SETTINGS, 7, slot)
        scene, person = drawn(file, size, plan)
        assert torch.equal(scene, drawn(file, size, stored)[0])
        assert plan.background == stored.background
        # The person is that of the slot, decoded as it would be alone or as small as the scene, if that is finer.
        box = plan_person_view(*size, persons, SETTINGS, 7, slot)
        assert box is not None
        alone = plan_views(box, None, stored.background, 32)
        scale = min(alone.scale, stored.scale)
        assert (plan.person_scale or plan.scale) == scale
        if scale == alone.scale:
            assert torch.equal(person, drawn(file, size, alone)[0])
        assert plan.person is not None
        assert (plan.person.mirror, plan.person.jitter) == (box.mirror, box.jitter)
    if persons == (SMALL,):
        assert plan.person_scale == 1
        assert stored.scale > 1
    else:
        assert plan.person_scale is None


def test_without_a_person_branch_the_stored_plan_is_the_plan() -> None:
    stored = plan_cached_scene(640, 480, SETTINGS, 5, SHA, 0)
    settings = replace(SETTINGS, with_person=False)
    assert plan_with_cached_scene(stored, 640, 480, (LARGE,), settings, 7, 9) is stored


@pytest.mark.parametrize("count", [1, 3, 8])
def test_consecutive_epochs_show_one_view_after_the_other(count: int) -> None:
    numbers = [choose_cached_view(count, 0, SHA, epoch) for epoch in range(2 * count)]
    assert sorted(numbers[:count]) == list(range(count))
    assert numbers[:count] == numbers[count:]
    starts = Counter(choose_cached_view(count, 0, sha256_bytes(bytes([i])), 0) for i in range(240))
    assert set(starts) == set(range(count))
    assert min(starts.values()) > 120 / count
