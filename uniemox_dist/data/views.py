"""Renders planned views: decodes a picture once, then crops and resizes it to the student's input.

Pixels stay uint8; student and teacher normalise them on the device. Views are B×3×H×W in channels-last order, in which
decoders write them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from shards.detect.types import Person
from shards.pictures.decode import check_picture, decode_scaled
from shards.pictures.formats import BadPicture
from shards.pictures.jpeg import is_jpeg
from shards.pictures.pixels import WHITE, Rgb
from uniemox_dist.data.crops import (
    Box,
    View,
    ViewPlan,
    ViewSettings,
    plan_evaluation_views,
    plan_training_views,
    scale_box,
)


class Renderer(Protocol):
    """Renders planned views. `render` does it on the CPU; a GPU decoder could do it in the training process."""

    def __call__(
        self, data: bytes, size: tuple[int, int], plan: ViewPlan, scene_3HW: Tensor, person_3HW: Tensor | None
    ) -> None:
        """Fills the views of one encoded picture; `size` is its upright width and height in the index.

        Raises:
            ValueError: if it cannot be decoded, or has another size.
        """
        ...


def render(
    data: bytes, size: tuple[int, int], plan: ViewPlan, scene_3HW: Tensor, person_3HW: Tensor | None
) -> None:
    """Renders the planned views of one encoded picture into uint8 tensors.

    Raises:
        ValueError: if it cannot be decoded, or its size differs from `size`.
    """
    rgb_3HW, scale = _decode(data, size, plan.background, plan.scale)
    scene_3HW.copy_(render_view(rgb_3HW, plan.scene, scene_3HW.shape[-1], scale))
    if plan.person is not None and person_3HW is not None:
        if plan.person_scale is not None:
            rgb_3HW, scale = _decode(data, size, plan.background, plan.person_scale)
        person_3HW.copy_(render_view(rgb_3HW, plan.person, person_3HW.shape[-1], scale))


def render_scenes(data: bytes, size: tuple[int, int], plans: Sequence[ViewPlan], scene_K3HW: Tensor) -> None:
    """Renders several scenes of one picture; scenes that can share a decode do.

    Raises:
        ValueError: like `render`.
    """
    # A JPEG has no transparent pixels, so its background does not matter.
    decodes = [(WHITE if is_jpeg(data) else plan.background, plan.scale) for plan in plans]
    for decode in dict.fromkeys(decodes):
        rgb_3HW, scale = _decode(data, size, *decode)
        for plan, own, scene_3HW in zip(plans, decodes, scene_K3HW):
            if own == decode:
                scene_3HW.copy_(render_view(rgb_3HW, plan.scene, scene_3HW.shape[-1], scale))


def render_view(rgb_3HW: Tensor, view: View, size: int, scale: int = 1) -> Tensor:
    """Renders one view of a picture that was decoded at 1/scale: crops, resizes, changes colours, mirrors."""
    box = scale_box(view.box, scale) if scale > 1 else view.box
    picture = crop_and_resize(rgb_3HW, box, size, view.resize)
    if view.jitter is not None:
        brightness, contrast, saturation = view.jitter
        picture = F.adjust_brightness(picture, brightness)
        picture = F.adjust_contrast(picture, contrast)
        picture = F.adjust_saturation(picture, saturation)
    return picture.flip(-1) if view.mirror else picture


def crop_and_resize(rgb_3HW: Tensor, box: Box, size: int, resize: str = "bicubic") -> Tensor:
    """Crops and resizes to size×size, antialiased; uint8 in and out."""
    left, top, width, height = box
    if (width, height) == (size, size):
        return rgb_3HW[:, top : top + height, left : left + width]
    crop_HW3 = rgb_3HW.permute(1, 2, 0).numpy()[top : top + height, left : left + width]
    # Resizing needs the crop in one piece, which numpy copies faster than torch would. `reshape` adds the batch's axis
    # in channels-last order; an index of None would hide that order, and resizing then takes twice as long.
    crop_13HW = np.ascontiguousarray(crop_HW3).reshape(1, height, width, 3).transpose(0, 3, 1, 2)
    return interpolate(torch.from_numpy(crop_13HW), (size, size), mode=resize, antialias=True)[0]


def decode_tensor(data: bytes, background: Rgb = WHITE) -> Tensor:
    """Decodes a picture to uint8 3×H×W, upright, with `background` behind transparent pixels.

    Raises:
        ValueError: if it cannot be decoded.
    """
    return torch.from_numpy(_decode_array(data, background, 1)[0]).permute(2, 0, 1)


def resize_whole(rgb_3HW: Tensor, size: int) -> Tensor:
    """Returns the view of evaluation: the whole picture resized to a square, without cropping."""
    return crop_and_resize(rgb_3HW, (0, 0, rgb_3HW.shape[2], rgb_3HW.shape[1]), size)


def training_views(
    data: bytes, persons: tuple[Person, ...], settings: ViewSettings, seed: int, slot: int
) -> tuple[Tensor, Tensor | None]:
    """Renders scene and person view (uint8 3×size×size) of one slot; the person is None without a person branch."""
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
    """Renders the views of evaluation: the whole picture and the person's crop, on white, unmirrored."""
    width, height = read_size(data)
    views = allocate_views(2, settings.image_size)
    render(data, (width, height), plan_evaluation_views(width, height, persons, settings), views[0], views[1])
    return views[0], views[1]


def read_size(data: bytes) -> tuple[int, int]:
    """Reads width and height of the upright picture from its header.

    Raises:
        ValueError: if the header cannot be read.
    """
    try:
        picture = check_picture(data, check="header")
    except BadPicture as bad:
        raise ValueError(f"cannot be decoded: {bad.detail}") from None
    return picture.width, picture.height


def _decode(data: bytes, size: tuple[int, int], background: Rgb, scale: int) -> tuple[Tensor, int]:
    """Decodes a picture to uint8 3×H×W; returns it with the scale of the result. Checks its size."""
    array_HW3, scale = _decode_array(data, background, scale)
    stated = (-(-size[0] // scale), -(-size[1] // scale))
    actual = (array_HW3.shape[1], array_HW3.shape[0])
    if actual != stated:
        raise ValueError(f"has {actual[0]} x {actual[1]} pixels where {stated[0]} x {stated[1]} are stated")
    return torch.from_numpy(array_HW3).permute(2, 0, 1), scale


def _decode_array(data: bytes, background: Rgb, scale: int) -> tuple[np.ndarray, int]:
    try:
        return decode_scaled(data, background, scale)
    except BadPicture as bad:
        raise ValueError(f"cannot be decoded: {bad.detail}") from None


def allocate_views(count: int, size: int) -> Tensor:
    """Allocates views: uint8 count×3×size×size, channels last."""
    return torch.empty((count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
