"""Boxes, flips and colours of a slot's views: pure functions of the picture's size, its persons, the seed and the slot.

No pixels are needed, so a decoder (on a CPU or a GPU) knows in advance which parts of a picture are needed and how
small it may decode it.
"""

import math
from dataclasses import dataclass, replace

from shards.detect.types import Person
from shards.pictures.pixels import WHITE, Rgb
from uniemox_dist.data.rng import Purpose, choice, mix64, uniform

Box = tuple[int, int, int, int]
"""Left, top, width, height in pixels of the upright picture."""
DENSITY = 2.0
"""Smallest number of decoded pixels per pixel of the view, along each side, if a picture is decoded at reduced size.

At this bound a view differs from one of the full decode by half a grey level on average over sharp photos. Below 2 some
photos exceed one grey level (docs/benchmarks/stream.md)."""


@dataclass(frozen=True)
class ViewSettings:
    """Settings of views. Fields have the names and meanings of the configuration's."""

    image_size: int = 224
    scene_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    person: str = "largest"
    person_margin: float = 0.15
    background: str = "white"
    colour_jitter: float = 0.0
    resize: str = "bicubic"
    with_person: bool = True
    """False without a person branch: no person view is made."""
    person_grid: int = 0
    """Patches along a side of the scene view, to mark those that show the person; 0 marks none."""


@dataclass(frozen=True)
class View:
    """One view of a picture."""

    box: Box
    mirror: bool = False
    jitter: tuple[float, float, float] | None = None
    """Factors of brightness, contrast and saturation, applied in this order."""
    resize: str = "bicubic"
    """Filter of the antialiased resize: bicubic or bilinear."""


@dataclass(frozen=True)
class ViewPlan:
    """The views of one slot, with all random choices made."""

    scene: View
    person: View | None
    background: Rgb
    """Behind transparent pixels."""
    scale: int
    """1, 2, 4 or 8: the picture may be decoded at 1/scale of its sides; boxes are multiples of it."""
    person_scale: int | None = None
    """Scale of the person if it needs a larger decode than the scene; only beside a cached scene."""


def plan_training_views(
    width: int, height: int, persons: tuple[Person, ...], settings: ViewSettings, seed: int, slot: int
) -> ViewPlan:
    """Plans the two views of a slot."""
    box = choose_scene_box(width, height, settings, seed, slot)
    scene = _make_view(box, settings, seed, slot, Purpose.SCENE_FLIP, Purpose.SCENE_JITTER)
    person = plan_person_view(width, height, persons, settings, seed, slot)
    return plan_views(scene, person, choose_background(settings, seed, slot), settings.image_size)


def plan_person_view(
    width: int, height: int, persons: tuple[Person, ...], settings: ViewSettings, seed: int, slot: int
) -> View | None:
    """Plans the person view of a slot; None if the settings ask for none."""
    if not settings.with_person:
        return None
    chosen = choose_person(persons, settings.person, seed, slot)
    box = grow_person_box(width, height, chosen, settings.person_margin)
    return _make_view(box, settings, seed, slot, Purpose.PERSON_FLIP, Purpose.PERSON_JITTER)


def plan_cached_scene(
    width: int, height: int, settings: ViewSettings, seed: int, image_sha256: str, number: int
) -> ViewPlan:
    """Plans scene view `number` of a picture for the cache.

    The picture's hash takes the place of a slot, so the view does not depend on the picture's shard and row.
    """
    key = mix64(int(image_sha256[:16], 16), number)
    return plan_training_views(width, height, (), replace(settings, with_person=False), seed, key)


def plan_with_cached_scene(
    cached: ViewPlan,
    width: int,
    height: int,
    persons: tuple[Person, ...],
    settings: ViewSettings,
    seed: int,
    slot: int,
) -> ViewPlan:
    """Plans the person view of a slot beside a cached scene, whose pixels stay exactly those that the teacher saw."""
    person = plan_person_view(width, height, persons, settings, seed, slot)
    if person is None:
        return cached
    alone = plan_views(person, None, cached.background, settings.image_size)
    if alone.scale < cached.scale:
        return replace(cached, person=alone.scene, person_scale=alone.scale)
    box = _snap_box(person.box, cached.scale) if cached.scale > 1 else person.box
    return replace(cached, person=replace(person, box=box))


def plan_evaluation_views(
    width: int, height: int, persons: tuple[Person, ...], settings: ViewSettings
) -> ViewPlan:
    """Plans the views of evaluation: the whole picture and the person's crop, on white, unmirrored, resized by the
    bicubic filter, without randomness. They are cut out of the full decode, as `load_encoder` does it."""
    how = "most_confident" if settings.person == "random" else settings.person
    box = grow_person_box(width, height, choose_person(persons, how, 0, 0), settings.person_margin)
    return ViewPlan(View((0, 0, width, height)), View(box), WHITE, scale=1)


def plan_views(scene: View, person: View | None, background: Rgb, image_size: int) -> ViewPlan:
    """Returns a plan with the largest scale that all boxes allow."""
    views = [scene] if person is None else [scene, person]
    side = min(min(view.box[2:]) for view in views)
    scale = next((k for k in (8, 4, 2) if side >= k * DENSITY * image_size), 1)
    if scale > 1:
        scene = replace(scene, box=_snap_box(scene.box, scale))
        if person is not None:
            person = replace(person, box=_snap_box(person.box, scale))
    return ViewPlan(scene, person, background, scale)


def scale_box(box: Box, scale: int) -> Box:
    """Converts a planned box to a picture decoded at 1/scale."""
    left, top, width, height = (edge // scale for edge in box)
    return left, top, width, height


def choose_background(settings: ViewSettings, seed: int, slot: int) -> Rgb:
    """Returns the colour behind transparent pixels in a slot."""
    if settings.background == "white":
        return WHITE
    bits = mix64(seed, slot, Purpose.BACKGROUND)
    return bits & 255, (bits >> 8) & 255, (bits >> 16) & 255


def choose_scene_box(width: int, height: int, settings: ViewSettings, seed: int, slot: int) -> Box:
    """Chooses the random resized crop: area share uniform in `scene_scale`, log aspect ratio uniform in 3/4…4/3.

    A shape larger than the picture is shrunk to fit. (torchvision draws again instead, so there the number of draws
    depends on the picture.)
    """
    low, high = settings.scene_scale
    area = width * height * (low + (high - low) * uniform(seed, slot, Purpose.SCENE_AREA))
    aspect = math.exp(math.log(4 / 3) * (2 * uniform(seed, slot, Purpose.SCENE_ASPECT) - 1))
    crop_w, crop_h = math.sqrt(area * aspect), math.sqrt(area / aspect)
    shrink = min(1.0, width / crop_w, height / crop_h)
    w, h = max(1, round(crop_w * shrink)), max(1, round(crop_h * shrink))
    left = int(uniform(seed, slot, Purpose.SCENE_X) * (width - w + 1))
    top = int(uniform(seed, slot, Purpose.SCENE_Y) * (height - h + 1))
    return left, top, w, h


def choose_person(persons: tuple[Person, ...], how: str, seed: int, slot: int) -> Person | None:
    """Chooses the person of the view; None if there is none. Among equals it prefers the more confident, then the
    first."""
    if not persons:
        return None
    if how == "random":
        return persons[choice(len(persons), seed, slot, Purpose.PERSON)]
    if how == "most_confident":
        return max(persons, key=lambda p: p.score)
    return max(persons, key=lambda p: ((p.box[2] - p.box[0]) * (p.box[3] - p.box[1]), p.score))


def grow_person_box(width: int, height: int, person: Person | None, margin: float) -> Box:
    """Returns the person's box, grown on each side by `margin` × its longer side; without a person the picture."""
    if person is None:
        return 0, 0, width, height
    x1, y1, x2, y2 = person.box
    grow = margin * max((x2 - x1) * width, (y2 - y1) * height)
    # A box without area at the right or lower edge still covers one pixel.
    left = min(max(0, math.floor(x1 * width - grow)), width - 1)
    top = min(max(0, math.floor(y1 * height - grow)), height - 1)
    right, bottom = min(width, math.ceil(x2 * width + grow)), min(height, math.ceil(y2 * height + grow))
    return left, top, max(1, right - left), max(1, bottom - top)


def find_person_patches(view: View, person: Person | None, width: int, height: int, side: int) -> list[bool]:
    """Returns for each of the side×side patches of a view, row by row, whether its centre is on the person."""
    if person is None:
        return [False] * side**2
    left, top, w, h = view.box
    x1, y1, x2, y2 = person.box
    xs = [x1 * width <= left + (i + 0.5) * w / side <= x2 * width for i in range(side)]
    ys = [y1 * height <= top + (i + 0.5) * h / side <= y2 * height for i in range(side)]
    if view.mirror:
        xs.reverse()
    return [x and y for y in ys for x in xs]


def _snap_box(box: Box, scale: int) -> Box:
    """Returns the box with its edges on whole pixels of the reduced picture.

    The reduced picture's last pixel may cover less than a whole one and is left out: stretching it would shift
    everything else by a fraction of a pixel, which is visible.
    """
    left, top, width, height = box
    right, bottom = (left + width) // scale * scale, (top + height) // scale * scale
    left, top = left // scale * scale, top // scale * scale
    return left, top, right - left, bottom - top


def _make_view(
    box: Box, settings: ViewSettings, seed: int, slot: int, flip: Purpose, jitter: Purpose
) -> View:
    mirror = settings.flip and uniform(seed, slot, flip) < 0.5
    return View(box, mirror, _choose_jitter(settings, seed, slot, jitter), settings.resize)


def _choose_jitter(
    settings: ViewSettings, seed: int, slot: int, purpose: Purpose
) -> tuple[float, float, float] | None:
    if not settings.colour_jitter:
        return None
    brightness, contrast, saturation = (
        1 + settings.colour_jitter * (2 * uniform(seed, slot, purpose, part) - 1) for part in range(3)
    )
    return brightness, contrast, saturation
