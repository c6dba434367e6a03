"""What fine-tuning does to views before they are learned from: RandAugment, erased rectangles, pairs that are mixed.

Every draw is one of a slot's, whatever rank or loader process makes it: timm's functions, which draw from the global
generators of Python, numpy and torch, run with those seeded by the slot. Pairs are neighbouring slots, 2k and 2k + 1 of
a turn of the streams. These lie in one micro-batch as long as its size is even and every rank has an even number of
streams, so that ranks do not matter here either. Views stay uint8: mixing rounds to half a grey level.
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
    """How two samples of a pair are mixed: each keeps `share` of itself and gets the rest of the other."""

    share: float
    box: tuple[int, int, int, int] | None
    """Left, top, right, bottom of the rectangle that they exchange; None: all pixels are blended."""


class LabelledDataset(PlannedDataset):
    """Micro-batches with targets, of varied views."""

    def __init__(self, *of: Any, config: FinetuneRun, **more: Any) -> None:
        super().__init__(*of, **more)
        self._config = config
        self._vary: Augment | None = None  # made where it is used: in a loader process

    def make(self, slots: Sequence[int], room: Tensor) -> MicroBatch:
        if self._vary is None:
            self._vary = Augment(self._config)
        batch = super().make(slots, room)
        for i, slot in enumerate(slots):
            for number, view_B3HW in enumerate((batch.scene_B3HW, batch.person_B3HW)):
                if view_B3HW is not None:
                    self._vary.view(view_B3HW[i], slot, number)
        return self._vary.pairs(batch)


class Augment:
    """The changes that a configuration asks for."""

    def __init__(self, config: FinetuneRun) -> None:
        """Raises UserError for a description that timm does not know."""
        settings, model = config.finetune, config.model
        self.settings, self.seed, self.size = settings, config.run.seed, config.model.image_size
        self._mean_311 = torch.tensor(model.mean).view(3, 1, 1)
        self._std_311 = torch.tensor(model.std).view(3, 1, 1)
        self._rand: Callable[[Image.Image], Image.Image] | None = None
        if settings.rand_augment:
            fill = tuple(min(255, round(255 * value)) for value in model.mean)
            shift = {"translate_const": int(self.size * 0.45), "img_mean": fill}
            try:
                self._rand = _with_some_bits(rand_augment_transform(settings.rand_augment, shift))
            except (AssertionError, ValueError, KeyError) as error:
                raise UserError(
                    f"finetune.rand_augment={settings.rand_augment}: is no description that timm "
                    f"knows ({error or 'it begins with rand'}); one is rand-m9-mstd0.5-inc1"
                ) from None
        self._erase = (
            RandomErasing(settings.erasing, mode="pixel", device="cpu") if settings.erasing else None
        )

    def view(self, view_3HW: Tensor, slot: int, number: int) -> None:
        """Changes one view in place; `number` is 0 for the scene and 1 for the person."""
        if self._rand is None and self._erase is None:
            return
        with seeded(mix64(self.seed, slot, Purpose.AUGMENT, number)):
            changed_3HW = view_3HW
            if self._rand is not None:
                picture = Image.fromarray(view_3HW.permute(1, 2, 0).numpy())
                changed_3HW = torch.from_numpy(np.array(self._rand(picture))).permute(2, 0, 1)
            if self._erase is not None:
                # Its noise is normal in standardised values.
                values = (changed_3HW.float() / 255 - self._mean_311) / self._std_311
                values = self._erase(values) * self._std_311 + self._mean_311
                changed_3HW = (values * 255).round().clamp(0, 255).byte()
            view_3HW.copy_(changed_3HW)

    def mix(self, slot: int) -> Mix | None:
        """How the pair that begins with this slot is mixed; None where it is not.

        The share is Beta(alpha, alpha); an exchanged rectangle has 1 - share of the area before the picture's edge
        cuts it, and the share is corrected for that (Yun et al. 2019).
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

    def pairs(self, batch: MicroBatch) -> MicroBatch:
        """Mixes neighbours: their views in place, and their targets."""
        if not self.settings.mixes:
            return batch
        assert batch.targets_BC is not None
        targets_BC = batch.targets_BC.clone()
        for i, slot in enumerate(batch.slots_B[::2].tolist()):
            mix = self.mix(slot)
            if mix is None:
                continue
            one, other = 2 * i, 2 * i + 1
            for view_B3HW in (batch.scene_B3HW, batch.person_B3HW):
                if view_B3HW is not None:
                    _mix_views(view_B3HW[one], view_B3HW[other], mix)
            a, b = batch.targets_BC[one], batch.targets_BC[other]
            targets_BC[one], targets_BC[other] = torch.lerp(b, a, mix.share), torch.lerp(a, b, mix.share)
        return replace(batch, targets_BC=targets_BC)


def _with_some_bits(transform: Any) -> Any:
    """RandAugment whose posterisation keeps one bit at least: at its strongest timm asks for none, which newer versions
    of Pillow refuse."""
    for op in getattr(transform, "ops", ()):
        if op.name.startswith("Posterize") and op.level_fn is not None:
            op.level_fn = partial(_one_bit, op.level_fn)
    return transform


def _one_bit(levels: Callable[[float, Any], tuple[int, ...]], level: float, settings: Any) -> tuple[int, ...]:
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
def seeded(seed: int) -> Iterator[None]:
    """The global generators of Python, numpy and torch (on the CPU) seeded, and afterwards as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            torch.manual_seed(seed >> 1)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
