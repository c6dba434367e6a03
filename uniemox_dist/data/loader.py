"""A map-style data set whose items are micro-batches: it reads, decodes and crops the samples of given slots.

Shape legend: B samples, N patches, E teacher embedding width, C outputs of a classifier, L drop-path layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from uniemox_dist.config.schema import Config
from uniemox_dist.data.crops import (
    ViewPlan,
    ViewSettings,
    choose_person,
    find_person_patches,
    plan_training_views,
    plan_with_cached_scene,
)
from uniemox_dist.data.labels import LabelledReader
from uniemox_dist.data.masks import SlotDraws
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.data.plan import Place, Plan
from uniemox_dist.data.reader import DamagedSample, RawSample
from uniemox_dist.data.rng import Purpose, choice, mix64
from uniemox_dist.data.stream import Reader, Stream
from uniemox_dist.data.views import Renderer, allocate_views, render

VIEW_FIELDS = ("scene_B3HW", "person_B3HW")
ROW_FIELDS = (
    "slots_B",
    "texts_BE",
    "pictures_BE",
    "on_person_BN",
    "targets_BC",
    "scene_order_BN",
    "person_order_BN",
    "drop_factors_BL",
)


class CaptionVectors(Protocol):
    """Text embeddings of a data set's captions, by shard and row."""

    def vector(self, shard: int, row: int, caption: int) -> Tensor:
        """Returns the unit row (E) of one caption; caption 0 of a row without captions is the empty text."""
        ...


@dataclass(frozen=True)
class CachedView:
    """A scene view that was drawn and embedded before the run."""

    plan: ViewPlan
    """The plan of the scene view; it has no person view."""
    picture_E: Tensor
    """The teacher's embedding Ω, an fp16 unit row."""


class CachedViews(Protocol):
    """Cached views of a data set, by shard and row."""

    count: int
    """K, views of each picture."""

    def view(self, shard: int, row: int, number: int) -> CachedView:
        """Returns view `number` (0…K-1) of the picture in a row.

        Raises:
            ValueError: if the picture was unreadable when its views were drawn.
        """
        ...


def choose_cached_view(count: int, seed: int, image_sha256: str, epoch: int) -> int:
    """Returns which cached view of a picture an epoch uses: one after the other, starting at a hash of the picture."""
    return (epoch + mix64(seed, int(image_sha256[:16], 16), Purpose.CACHED_VIEW)) % count


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, in slot order."""

    slots_B: Tensor
    """int64."""
    scene_B3HW: Tensor
    """uint8, channels last."""
    person_B3HW: Tensor | None
    """Like the scene; None without a person branch."""
    texts_BE: Tensor | None
    """Caption embeddings, unit rows in the cache's number format, fp16; None if no loss needs texts."""
    pictures_BE: Tensor | None
    """Cached teacher embeddings of the scenes, fp32 unit rows; None with a live teacher."""
    on_person_BN: Tensor | None
    """bool: True for patches of the scene that show the person; None unless model.mask=person."""
    keys: tuple[str, ...]
    sources: tuple[int, ...]
    damaged: tuple[str, ...]
    """One line per sample that was replaced."""
    counts: ReadCounts
    """Reads, bytes, cache hits and retries of this micro-batch."""
    targets_BC: Tensor | None = None
    """fp32 targets in fine-tuning; None in pretraining."""
    scene_order_BN: Tensor | None = None
    """Order of the scene's patches, whose first ones are visible; None if no masks were drawn."""
    person_order_BN: Tensor | None = None
    """Like the scene's; None without a person branch."""
    drop_factors_BL: Tensor | None = None
    """Factors of residual branches, two rows a sample (scenes, then persons); None without drop path."""

    def pin_memory(self) -> "MicroBatch":
        """Pins the tensors, so that copies to a GPU run beside the step. Called by the DataLoader."""
        return self._replace({name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def to(self, device: torch.device) -> "MicroBatch":
        """Copies the tensors to a device, asynchronously."""
        return self._replace(
            {n: tensor.to(device, non_blocking=True) for n, tensor in self._tensors().items()}
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {n: getattr(self, n) for n in (*VIEW_FIELDS, *ROW_FIELDS)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _replace(self, tensors: dict[str, Tensor]) -> "MicroBatch":
        changed: MicroBatch = replace(self, **tensors)  # type: ignore[arg-type]
        return changed


class PlannedDataset(Dataset[MicroBatch]):
    """`dataset[slots]` is the micro-batch of those slots."""

    def __init__(
        self,
        stream: Stream[RawSample],
        vectors: Sequence[CaptionVectors] | None,
        settings: ViewSettings,
        *,
        cached_views: Sequence[CachedViews] | None = None,
        renderer: Renderer = render,
        draws: SlotDraws | None = None,
    ) -> None:
        """
        Args:
            stream: the order of the samples, and their readers.
            vectors: caption embeddings of each source; None if no loss needs texts.
            cached_views: cached scene views of each source; None to draw new scenes.
            draws: draws masks and drop paths; None leaves them out.
        """
        self.stream, self.vectors, self.cached_views = stream, vectors, cached_views
        self.settings, self.renderer, self.draws = settings, renderer, draws

    @property
    def plan(self) -> Plan:
        """The order of samples."""
        return self.stream.plan

    @property
    def readers(self) -> Sequence[Reader[RawSample]]:
        """One for each source of the plan."""
        return self.stream.readers

    @property
    def seed(self) -> int:
        """The seed of everything that is drawn for a slot."""
        return self.stream.seed

    @property
    def views_per_sample(self) -> int:
        """2 with a person branch, 1 without."""
        return 2 if self.settings.with_person else 1

    def __getitem__(self, slots: Sequence[int]) -> MicroBatch:
        return self.load(slots, allocate_views(self.views_per_sample * len(slots), self.settings.image_size))

    def load(self, slots: Sequence[int], views: Tensor) -> MicroBatch:
        """Loads the samples of some slots. Writes their scenes, followed by their persons, into `views`."""
        B = len(slots)
        scene_B3HW = views[:B]
        person_B3HW = views[B : 2 * B] if self.settings.with_person else None
        before = [replace(reader.origin.counts) for reader in self.readers]
        samples: list[_Sample] = []
        damaged: list[str] = []
        for i, slot in enumerate(slots):
            person_3HW = None if person_B3HW is None else person_B3HW[i]
            samples.append(self._load_sample(slot, scene_B3HW[i], person_3HW, damaged))
        slots_B = torch.tensor(list(slots), dtype=torch.int64)
        on_person_BN = None
        if self.settings.person_grid:
            on_person_BN = torch.tensor([sample.on_person_N for sample in samples])
        drawn = {}
        if self.draws is not None:
            drawn = self.draws.draw(slots_B, on_person_BN, with_person=self.settings.with_person)
        return MicroBatch(
            slots_B=slots_B,
            scene_B3HW=scene_B3HW,
            person_B3HW=person_B3HW,
            texts_BE=_stack_rows([sample.text_E for sample in samples]),
            pictures_BE=_stack_fp32([sample.picture_E for sample in samples]),
            on_person_BN=on_person_BN,
            keys=tuple(sample.key for sample in samples),
            sources=tuple(sample.source for sample in samples),
            damaged=tuple(damaged),
            counts=sum((r.origin.counts - b for r, b in zip(self.readers, before)), ReadCounts()),
            targets_BC=_stack_fp32([sample.target_C for sample in samples]),
            **drawn,
        )

    def _load_sample(
        self, slot: int, scene_3HW: Tensor, person_3HW: Tensor | None, damaged: list[str]
    ) -> "_Sample":
        """Loads the sample of a slot and fills its views."""

        def use(raw: RawSample, place: Place) -> _Sample:
            try:
                plan, picture = self._plan_views(raw, place, slot)
                self.renderer(raw.image, (raw.width, raw.height), plan, scene_3HW, person_3HW)
            except ValueError as error:
                name = self.readers[place.source].manifest.shards[place.shard].name
                raise DamagedSample(f"{name}: {raw.key}: {error}") from None
            return self._describe(raw, place, slot, plan, picture)

        return self.stream.take(slot, use, damaged)

    def _describe(
        self, raw: RawSample, place: Place, slot: int, plan: ViewPlan, picture: Tensor | None
    ) -> "_Sample":
        """Returns what belongs to a sample besides its views."""
        reader = self.readers[place.source]
        text = None
        if self.vectors is not None:
            caption = choice(max(1, len(raw.captions)), self.seed, slot, Purpose.CAPTION)
            text = self.vectors[place.source].vector(place.shard, place.row, caption)
        target = None
        if isinstance(reader, LabelledReader):
            target = torch.from_numpy(reader.target(place.shard, place.row))
        return _Sample(
            raw.key, place.source, text, picture, self._find_person_patches(raw, plan, slot), target
        )

    def _plan_views(self, raw: RawSample, place: Place, slot: int) -> tuple[ViewPlan, Tensor | None]:
        """Returns the views of a slot, and the teacher's embedding of the scene if the scene is cached."""
        size, settings = (raw.width, raw.height), self.settings
        if self.cached_views is None:
            return plan_training_views(*size, raw.persons, settings, self.seed, slot), None
        cached = self.cached_views[place.source]
        number = choose_cached_view(cached.count, self.seed, raw.image_sha256, place.epoch)
        view = cached.view(place.shard, place.row, number)
        plan = plan_with_cached_scene(view.plan, *size, raw.persons, settings, self.seed, slot)
        return plan, view.picture_E

    def _find_person_patches(self, raw: RawSample, plan: ViewPlan, slot: int) -> list[bool]:
        person = choose_person(raw.persons, self.settings.person, self.seed, slot)
        return find_person_patches(plan.scene, person, raw.width, raw.height, self.settings.person_grid)


@dataclass(frozen=True)
class _Sample:
    """The sample of a slot, without its views."""

    key: str
    source: int
    text_E: Tensor | None
    picture_E: Tensor | None
    on_person_N: list[bool]
    target_C: Tensor | None


def _stack_rows(rows: list[Tensor | None]) -> Tensor | None:
    """Stacks rows; None if there are none."""
    present = [row for row in rows if row is not None]
    return torch.stack(present) if present else None


def _stack_fp32(rows: list[Tensor | None]) -> Tensor | None:
    """Stacks rows as fp32; None if there are none."""
    stacked = _stack_rows(rows)
    return None if stacked is None else stacked.float()


def view_settings(config: Config, *, with_person: bool = True) -> ViewSettings:
    """Returns the settings of the views that a configuration asks for."""
    data = config.data
    return ViewSettings(
        image_size=config.model.image_size,
        scene_scale=data.scene_scale,
        flip=data.flip,
        person=data.person,
        person_margin=data.person_margin,
        background=data.background,
        colour_jitter=data.colour_jitter,
        resize=data.resize,
        with_person=with_person,
        person_grid=config.model.patch_grid if config.model.mask == "person" else 0,
    )
