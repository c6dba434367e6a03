"""A release whose methods take pictures.

Shape legend: B pictures, D encoder width, E width of the teacher's space.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from shards.detect.types import Person
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import grow_person_box
from uniemox_dist.data.views import crop_and_resize, resize_whole
from uniemox_dist.models.student import Student

Pictures = Image.Image | Sequence[Image.Image] | Tensor
PersonBox = tuple[float, float, float, float]
"""Left, top, right, bottom as shares (0…1) of the upright picture's width and height."""


class UniEmoX:
    """Encoder, projection and fusion of a release, in eval mode; see `uniemox_dist.load_uniemox`."""

    def __init__(
        self,
        student: Student,
        facts: dict[str, Any],
        to_pixels: Callable[[Image.Image], Tensor],
        device: torch.device,
    ) -> None:
        self.student = student.to(device).eval()
        self.facts = facts
        """The contents of uniemox.json."""
        self.device = device
        self._to_pixels = to_pixels
        self._margin = Config.model_validate(facts["config"]).data.person_margin

    @property
    def image_size(self) -> int:
        """Side of the encoder's input in pixels."""
        return self.student.model.image_size

    @property
    def has_space(self) -> bool:
        """True if the release maps pictures into a teacher's space (`embed`)."""
        return self.student.fusion is not None

    @torch.no_grad()
    def encode(self, scene: Pictures) -> Tensor:
        """The encoder's class tokens, B×D float32: the recommended features.

        Args:
            scene: a picture, pictures, or uint8 B×3×H×W.
        """
        return self.student.encode(self.views(scene, None)[0]).float()

    @torch.no_grad()
    def embed(self, scene: Pictures, persons: Sequence[PersonBox | None] | None = None) -> Tensor:
        """The fused vectors γ, B×E float32 with rows of length 1. Their products with the teacher's unit text
        embeddings approximate the similarities of the teacher's own picture embeddings.

        Args:
            scene: a picture, pictures, or uint8 B×3×H×W.
            persons: for each picture the box of a person, or None. Boxes grow by the margin of training
                (`data.person_margin`). Without a person the whole picture is the person view, as in training.

        Raises:
            UserError: if the release has no fusion, there are no pictures, or boxes are invalid.
        """
        return self.embed_views(*self.views(scene, persons))

    @torch.no_grad()
    def embed_views(self, scenes_B3HW: Tensor, persons_B3HW: Tensor) -> Tensor:
        """Like `embed`, for views that are already cropped and resized (uint8, on the device). If both are the same
        tensor, the encoder reads it once."""
        if not self.has_space:
            raise UserError(
                f"RELEASE: {self.facts['run']} was trained without a teacher: there is no fused space; use encode()"
            )
        fused_BE = self.student.embed(scenes_B3HW, persons_B3HW)[1]
        assert fused_BE is not None
        return F.normalize(fused_BE.float(), dim=-1)

    def views(self, scene: Pictures, persons: Sequence[PersonBox | None] | None) -> tuple[Tensor, Tensor]:
        """Scene and person views on the device, uint8 B×3×size×size each."""
        pictures = self._pictures(scene)
        if not pictures:
            raise UserError("scene: has no pictures; give at least one")
        boxes = [None] * len(pictures) if persons is None else list(persons)
        if len(boxes) != len(pictures):
            raise UserError(
                f"persons: has {len(boxes)} boxes for {len(pictures)} pictures; give one or None for each"
            )
        size = self.image_size
        scenes = torch.stack([resize_whole(pixels_3HW, size) for pixels_3HW in pictures])
        if all(box is None for box in boxes):
            return (moved := scenes.to(self.device)), moved
        crops = torch.stack([self._crop(p, box) for p, box in zip(pictures, boxes)])
        return scenes.to(self.device), crops.to(self.device)

    def _crop(self, pixels_3HW: Tensor, box: PersonBox | None) -> Tensor:
        height, width = pixels_3HW.shape[1:]
        person = None
        if box is not None:
            try:
                left, top, right, bottom = box
            except (TypeError, ValueError):
                raise UserError(
                    f"persons: {box!r} is not a box; give left, top, right, bottom, or None"
                ) from None
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise UserError(f"persons: box {box} is not left < right, top < bottom in shares of 0 to 1")
            person = Person(box=(left, top, right, bottom), score=1.0)
        return crop_and_resize(
            pixels_3HW, grow_person_box(width, height, person, self._margin), self.image_size
        )

    def _pictures(self, scene: Pictures) -> list[Tensor]:
        if isinstance(scene, Image.Image):
            return [self._to_pixels(scene)]
        if isinstance(scene, Tensor):
            if scene.dtype != torch.uint8 or scene.ndim != 4 or scene.shape[1] != 3:
                shape = "×".join(map(str, scene.shape))
                raise UserError(
                    f"scene: is {scene.dtype} {shape}; give pictures, or uint8 B×3×H×W (0 to 255)"
                )
            return list(scene.cpu())
        pictures = list(scene)
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise UserError(f"scene: {picture!r:.80} is not a picture; open files with PIL.Image.open")
        return [self._to_pixels(picture) for picture in pictures]
