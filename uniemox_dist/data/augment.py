"""Augmentation in fine-tuning: RandAugment, random erasing, and mixup or CutMix of sample pairs.

All random numbers depend on the slot only, not on the rank or loader process. timm's functions draw from the global
generators of Python, numpy and torch, which are therefore seeded by the slot while they run. Pairs are neighbouring
slots, 2k and 2k + 1 of a turn of the streams. Both are in one micro-batch if its size is even and every rank has an
even number of streams. Views stay uint8, so mixing rounds by up to half a grey level.

Shape legend: B samples, C outputs of a classifier.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.loader import MicroBatch, PlannedDataset
from uniemox_dist.data.rng import Purpose, mix64


@dataclass(frozen=True)
class Mix:
    """How the two samples of a pair are mixed: each keeps `share` of itself and gets the rest from the other."""

    share: float
    box: tuple[int, int, int, int] | None
    """Left, top, right, bottom of the exchanged rectangle (CutMix); None blends all pixels (mixup)."""


class LabelledDataset(PlannedDataset):
    """Loads micro-batches with targets and augments their views."""

    def __init__(self, *arguments: Any, config: FinetuneRun, **options: Any) -> None:
        """Arguments are those of `PlannedDataset`."""
        super().__init__(*arguments, **options)
        self._config = config
        self._augment: Augment | None = None  # created on first use, in a loader process

    def load(self, slots: Sequence[int], views: Tensor) -> MicroBatch:
        if self._augment is None:
            self._augment = Augment(self._config)
        batch = super().load(slots, views)
        for i, slot in enumerate(slots):
            for number, view_B3HW in enumerate((batch.scene_B3HW, batch.person_B3HW)):
                if view_B3HW is not None:
                    self._augment.change_view(view_B3HW[i], slot, number)
        return self._augment.mix_pairs(batch)


class Augment:
    """The augmentation that a configuration asks for."""

    def __init__(self, config: FinetuneRun) -> None:
        """Raises UserError if timm does not accept `finetune.rand_augment`."""
        settings, model = config.finetune, config.model
        self.settings, self.seed, self.size = settings, config.run.seed, config.model.image_size
        self._mean_311 = torch.tensor(model.mean).view(3, 1, 1)
        self._std_311 = torch.tensor(model.std).view(3, 1, 1)
        self._rand: Callable[[Image.Image], Image.Image] | None = None
        if settings.rand_augment:
            fill = tuple(min(255, round(255 * value)) for value in model.mean)
            shift = {"translate_const": int(self.size * 0.45), "img_mean": fill}
            try:
                self._rand = _keep_one_bit(rand_augment_transform(settings.rand_augment, shift))
            except (AssertionError, ValueError, KeyError) as error:
                raise UserError(
                    f"finetune.rand_augment={settings.rand_augment}: timm does not accept it "
                    f"({error or 'it must begin with rand'}); try rand-m9-mstd0.5-inc1"
                ) from None
        self._erase = (
            RandomErasing(settings.erasing, mode="pixel", device="cpu") if settings.erasing else None
        )

    def change_view(self, view_3HW: Tensor, slot: int, number: int) -> None:
        """Applies RandAugment and erasing to one view in place; `number` is 0 for the scene and 1 for the person."""
        if self._rand is None and self._erase is None:
            return
        with seed_libraries(mix64(self.seed, slot, Purpose.AUGMENT, number)):
            changed_3HW = view_3HW
            if self._rand is not None:
                picture = Image.fromarray(view_3HW.permute(1, 2, 0).numpy())
                changed_3HW = torch.from_numpy(np.array(self._rand(picture))).permute(2, 0, 1)
            if self._erase is not None:
                # RandomErasing fills with normal noise, which fits standardised values.
                values = (changed_3HW.float() / 255 - self._mean_311) / self._std_311
                values = self._erase(values) * self._std_311 + self._mean_311
                changed_3HW = (values * 255).round().clamp(0, 255).byte()
            view_3HW.copy_(changed_3HW)

    def choose_mix(self, slot: int) -> Mix | None:
        """Chooses how the pair that begins with this slot is mixed; None leaves it unchanged.

        The share is Beta(alpha, alpha) (mixup, Zhang et al. 2018). An exchanged rectangle has 1 - share of the area
        before it is clipped at the picture's edge, and the share is corrected for the clipping (CutMix, Yun et al.
        2019).
        """
        settings = self.settings
        draw = random.Random(mix64(self.seed, slot, Purpose.MIX))
        if not settings.mixes or draw.random() >= settings.mix_share:
            return None
        cuts = draw.random() < 0.5 if settings.mixup and settings.cutmix else not settings.mixup
        alpha = settings.cutmix if cuts else settings.mixup
        share = draw.betavariate(alpha, alpha)
        if not cuts:
            return Mix(share, None)
        side, x, y = self.size * math.sqrt(1 - share), draw.random() * self.size, draw.random() * self.size
        edges = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
        left, top, right, bottom = (min(self.size, max(0, round(edge))) for edge in edges)
        return Mix(1 - (right - left) * (bottom - top) / self.size**2, (left, top, right, bottom))

    def mix_pairs(self, batch: MicroBatch) -> MicroBatch:
        """Mixes neighbouring samples: views in place, targets in a copy."""
        if not self.settings.mixes:
            return batch
        assert batch.targets_BC is not None
        targets_BC = batch.targets_BC.clone()
        for i, slot in enumerate(batch.slots_B[::2].tolist()):
            mix = self.choose_mix(slot)
            if mix is None:
                continue
            one, other = 2 * i, 2 * i + 1
            for view_B3HW in (batch.scene_B3HW, batch.person_B3HW):
                if view_B3HW is not None:
                    _mix_views(view_B3HW[one], view_B3HW[other], mix)
            a, b = batch.targets_BC[one], batch.targets_BC[other]
            targets_BC[one], targets_BC[other] = torch.lerp(b, a, mix.share), torch.lerp(a, b, mix.share)
        return replace(batch, targets_BC=targets_BC)


def _keep_one_bit(transform: Any) -> Any:
    """Limits RandAugment's posterisation to at least one bit.

    At its strongest timm asks for zero bits, which newer versions of Pillow reject.
    """
    for op in getattr(transform, "ops", ()):
        if op.name.startswith("Posterize") and op.level_fn is not None:
            op.level_fn = partial(_at_least_one_bit, op.level_fn)
    return transform


def _at_least_one_bit(
    levels: Callable[[float, Any], tuple[int, ...]], level: float, settings: Any
) -> tuple[int, ...]:
    return tuple(max(1, bits) for bits in levels(level, settings))


def _mix_views(a_3HW: Tensor, b_3HW: Tensor, mix: Mix) -> None:
    if mix.box is not None:
        left, top, right, bottom = mix.box
        part = (slice(None), slice(top, bottom), slice(left, right))
        kept = a_3HW[part].clone()
        a_3HW[part] = b_3HW[part]
        b_3HW[part] = kept
        return
    a, b = a_3HW.float(), b_3HW.float()
    a_3HW.copy_(torch.lerp(b, a, mix.share).round())
    b_3HW.copy_(torch.lerp(a, b, mix.share).round())


@contextmanager
def seed_libraries(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, numpy and torch (CPU) inside the block and restores them after it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            torch.manual_seed(seed >> 1)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
