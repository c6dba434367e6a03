"""Two views from one decode: the scene (random resized crop) and the person (the crop of a detected person).

Everything random is drawn by (seed, slot, purpose). Pixels stay uint8; normalisation happens on the device.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from shards.persons import Person
from shards.pictures import explain, on_background, upright
from uniemox_dist.data.draws import Purpose, choice, mix64, uniform

Box = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class ViewSettings:
    """How views are made; the fields of the same names in the configuration say what they mean."""

    image_size: int = 224
    scene_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    person: str = "largest"
    person_margin: float = 0.15
    background: str = "white"
    with_person: bool = True
    """False without fusion: the person view is not made at all."""


def decode_rgb(data: bytes, background: tuple[int, int, int] = WHITE) -> Tensor:
    """Encoded picture to uint8 3×H×W, upright, with `background` behind transparent pixels.

    Raises:
        ValueError: if it cannot be decoded.
    """
    if data[:2] == b"\xff\xd8":
        try:
            # The fast path for what most pictures are; unusual files (CMYK, …) go the way below.
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            rgb = on_background(upright(image), background)
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise ValueError(f"cannot be decoded: {explain(error)}") from None
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def background_colour(settings: ViewSettings, seed: int, slot: int) -> tuple[int, int, int]:
    """The colour behind transparent pixels in a slot."""
    if settings.background == "white":
        return WHITE
    bits = mix64(seed, slot, Purpose.BACKGROUND)
    return bits & 255, (bits >> 8) & 255, (bits >> 16) & 255


def scene_box(width: int, height: int, settings: ViewSettings, seed: int, slot: int) -> Box:
    """The random resized crop: area share uniform in `scene_scale`, log aspect ratio uniform in 3/4…4/3.

    Where the drawn shape is larger than the picture it is shrunk to fit (torchvision draws again instead,
    which would make the number of draws depend on the picture).
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
    """The person that the view shows; None where nobody was found. Ties: the more confident, the earlier."""
    if not persons:
        return None
    if how == "random":
        return persons[choice(len(persons), seed, slot, Purpose.PERSON)]
    if how == "most_confident":
        return max(persons, key=lambda p: p.score)
    return max(persons, key=lambda p: ((p.box[2] - p.box[0]) * (p.box[3] - p.box[1]), p.score))


def person_box(width: int, height: int, person: Person | None, margin: float) -> Box:
    """The person's box, grown on each side by `margin` times its longer side; or else the whole picture."""
    if person is None:
        return 0, 0, width, height
    x1, y1, x2, y2 = person.box
    grow = margin * max((x2 - x1) * width, (y2 - y1) * height)
    # A box without area at the right or lower edge still gets a pixel of the picture.
    left = min(max(0, math.floor(x1 * width - grow)), width - 1)
    top = min(max(0, math.floor(y1 * height - grow)), height - 1)
    right, bottom = min(width, math.ceil(x2 * width + grow)), min(height, math.ceil(y2 * height + grow))
    return left, top, max(1, right - left), max(1, bottom - top)


def cut(rgb_3HW: Tensor, box: Box, size: int, mirror: bool = False) -> Tensor:
    """Crop, antialiased bicubic resize to size×size, and mirror; uint8 in and out."""
    left, top, width, height = box
    view = F.resized_crop(
        rgb_3HW,
        top,
        left,
        height,
        width,
        [size, size],
        interpolation=F.InterpolationMode.BICUBIC,
        antialias=True,
    )
    return view.flip(-1) if mirror else view


def whole(rgb_3HW: Tensor, size: int) -> Tensor:
    """The evaluation view: the whole picture, resized (its aspect ratio is not kept: nothing is cut off)."""
    return cut(rgb_3HW, (0, 0, rgb_3HW.shape[2], rgb_3HW.shape[1]), size)


def training_views(
    data: bytes, persons: tuple[Person, ...], settings: ViewSettings, seed: int, slot: int
) -> tuple[Tensor, Tensor | None]:
    """Scene and person view (uint8 3×size×size) of one slot; no person view where the settings say so."""
    rgb = decode_rgb(data, background_colour(settings, seed, slot))
    height, width = rgb.shape[1:]

    def mirrored(purpose: Purpose) -> bool:
        return settings.flip and uniform(seed, slot, purpose) < 0.5

    box = scene_box(width, height, settings, seed, slot)
    scene = cut(rgb, box, settings.image_size, mirrored(Purpose.SCENE_FLIP))
    if not settings.with_person:
        return scene, None
    person = choose_person(persons, settings.person, seed, slot)
    box = person_box(width, height, person, settings.person_margin)
    return scene, cut(rgb, box, settings.image_size, mirrored(Purpose.PERSON_FLIP))


def evaluation_views(
    data: bytes, persons: tuple[Person, ...], settings: ViewSettings
) -> tuple[Tensor, Tensor]:
    """The whole picture and the person's crop, on white, unmirrored: nothing is random."""
    rgb = decode_rgb(data)
    person = choose_person(
        persons, "most_confident" if settings.person == "random" else settings.person, 0, 0
    )
    box = person_box(rgb.shape[2], rgb.shape[1], person, settings.person_margin)
    return whole(rgb, settings.image_size), cut(rgb, box, settings.image_size)
