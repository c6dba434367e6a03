"""Views from one decode: crops resized to the student's input, by a plan of boxes.

Pixels stay uint8; normalisation happens on the device, for student and teacher alike. Views are B×3×H×W in the
channels-last order in which decoders write them.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from shards.detect.types import Person
from shards.pictures import WHITE, BadPicture, Rgb, check_picture, is_jpeg
from uniemox_dist.data.crops import (
    Box,
    View,
    ViewPlan,
    ViewSettings,
    plan_evaluation_views,
    plan_training_views,
    scale_box,
)
from uniemox_dist.data.decode import decode_rgb as decode_array


class Renderer(Protocol):
    """Draws planned views. `render` below does it on the CPU; a decoder on a GPU would do it in the training process,
    from the same bytes and plans."""

    def __call__(
        self, data: bytes, size: tuple[int, int], plan: ViewPlan, scene_3HW: Tensor, person_3HW: Tensor | None
    ) -> None:
        """Fills the views of one encoded picture; `size` is its stated width and height, upright.

        Raises:
            ValueError: if it cannot be decoded, or has another size.
        """
        ...


def render(
    data: bytes, size: tuple[int, int], plan: ViewPlan, scene_3HW: Tensor, person_3HW: Tensor | None
) -> None:
    """Fills the planned views of one encoded picture (uint8).

    Raises:
        ValueError: if it cannot be decoded, or has another size than stated.
    """
    rgb_3HW, scale = _decode(data, size, plan.background, plan.scale)
    scene_3HW.copy_(render_view(rgb_3HW, plan.scene, scene_3HW.shape[-1], scale))
    if plan.person is not None and person_3HW is not None:
        if plan.person_scale is not None:
            rgb_3HW, scale = _decode(data, size, plan.background, plan.person_scale)
        person_3HW.copy_(render_view(rgb_3HW, plan.person, person_3HW.shape[-1], scale))


def render_scenes(data: bytes, size: tuple[int, int], plans: Sequence[ViewPlan], scene_K3HW: Tensor) -> None:
    """`render` of several scenes of one picture, which is decoded once for all that can share a decode.

    Raises:
        ValueError: as `render` does.
    """
    # Where nothing is transparent the background does not matter.
    ways = [(WHITE if is_jpeg(data) else plan.background, plan.scale) for plan in plans]
    for way in dict.fromkeys(ways):
        rgb_3HW, scale = _decode(data, size, *way)
        for plan, own, scene_3HW in zip(plans, ways, scene_K3HW):
            if own == way:
                scene_3HW.copy_(render_view(rgb_3HW, plan.scene, scene_3HW.shape[-1], scale))


def render_view(rgb_3HW: Tensor, view: View, size: int, scale: int = 1) -> Tensor:
    """One view of a picture that was decoded at 1/scale: crop, resize, colour, mirror."""
    picture = crop_and_resize(rgb_3HW, scale_box(view.box, scale) if scale > 1 else view.box, size)
    if view.jitter is not None:
        brightness, contrast, saturation = view.jitter
        picture = F.adjust_brightness(picture, brightness)
        picture = F.adjust_contrast(picture, contrast)
        picture = F.adjust_saturation(picture, saturation)
    return picture.flip(-1) if view.mirror else picture


def crop_and_resize(rgb_3HW: Tensor, box: Box, size: int) -> Tensor:
    """Crop and antialiased bicubic resize to size×size; uint8 in and out."""
    left, top, width, height = box
    crop_3HW = rgb_3HW[:, top : top + height, left : left + width]
    if (width, height) == (size, size):
        return crop_3HW
    # As a batch of one in channels-last order (`[None]` alone would hide that order): resizing needs half the time.
    crop_13HW = crop_3HW.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return interpolate(crop_13HW, (size, size), mode="bicubic", antialias=True)[0]


def decode_tensor(data: bytes, background: Rgb = WHITE) -> Tensor:
    """Encoded picture to uint8 3×H×W, upright, with `background` behind transparent pixels.

    Raises:
        ValueError: if it cannot be decoded.
    """
    return torch.from_numpy(decode_array(data, background)[0]).permute(2, 0, 1)


def resize_whole(rgb_3HW: Tensor, size: int) -> Tensor:
    """The evaluation view: the whole picture, resized (its aspect ratio is not kept: nothing is cut off)."""
    return crop_and_resize(rgb_3HW, (0, 0, rgb_3HW.shape[2], rgb_3HW.shape[1]), size)


def training_views(
    data: bytes, persons: tuple[Person, ...], settings: ViewSettings, seed: int, slot: int
) -> tuple[Tensor, Tensor | None]:
    """Scene and person view (uint8 3×size×size) of one slot; no person view where the settings say so."""
    width, height = read_size(data)
    plan = plan_training_views(width, height, persons, settings, seed, slot)
    scene, person = allocate_views(1, settings.image_size), None
    if plan.person is not None:
        person = allocate_views(1, settings.image_size)
    render(data, (width, height), plan, scene[0], None if person is None else person[0])
    return scene[0], None if person is None else person[0]


def evaluation_views(
    data: bytes, persons: tuple[Person, ...], settings: ViewSettings
) -> tuple[Tensor, Tensor]:
    """The whole picture and the person's crop, on white, unmirrored: nothing is random."""
    width, height = read_size(data)
    views = allocate_views(2, settings.image_size)
    render(data, (width, height), plan_evaluation_views(width, height, persons, settings), views[0], views[1])
    return views[0], views[1]


def read_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright picture, from its header.

    Raises:
        ValueError: if it has none that can be read.
    """
    try:
        picture = check_picture(data, check="header")
    except BadPicture as bad:
        raise ValueError(f"cannot be decoded: {bad.detail}") from None
    return picture.width, picture.height


def _decode(data: bytes, size: tuple[int, int], background: Rgb, scale: int) -> tuple[Tensor, int]:
    """The picture as uint8 3×H×W, and the scale it came at; its stated size is checked."""
    array_HW3, scale = decode_array(data, background, scale)
    stated = (-(-size[0] // scale), -(-size[1] // scale))
    found = (array_HW3.shape[1], array_HW3.shape[0])
    if found != stated:
        raise ValueError(f"has {found[0]} x {found[1]} pixels where {stated[0]} x {stated[1]} are stated")
    return torch.from_numpy(array_HW3).permute(2, 0, 1), scale


def allocate_views(count: int, size: int) -> Tensor:
    """Room for views: uint8 count×3×size×size, channels last."""
    return torch.empty((count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
