"""Micro-batches by plan: a map-style data set whose item is one micro-batch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault
from uniemox_dist.data.cached_views import StoredViews, which_view
from uniemox_dist.data.crops import (
    ViewPlan,
    ViewSettings,
    choose_person,
    on_person,
    training_plan,
    with_stored_scene,
)
from uniemox_dist.data.labelled import LabelledReader
from uniemox_dist.data.origin import Counts
from uniemox_dist.data.plan import Place, Plan
from uniemox_dist.data.reader import DamagedSample, RawSample, ShardReader
from uniemox_dist.data.rng import Purpose, choice
from uniemox_dist.data.views import Renderer, empty_views, render

REPLACEMENTS = 8
"""Damaged samples in a row, on one stream, after which the data set is taken to be unusable."""


class CaptionVectors(Protocol):
    """Text embeddings of a data set's captions, by place."""

    def vector(self, shard: int, row: int, caption: int) -> Tensor:
        """The unit row (E) of one caption; caption 0 of a row without captions is the empty text."""
        ...


VIEWS = ("scene_B3HW", "person_B3HW")
SMALL = ("slots_B", "texts_BE", "pictures_BE", "on_person_BN", "targets_BC")


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, in slot order. Shapes: B samples, E teacher embedding width."""

    slots_B: Tensor
    """int64."""
    scene_B3HW: Tensor
    """uint8, channels last."""
    person_B3HW: Tensor | None
    """As the scene; None without a person branch."""
    texts_BE: Tensor | None
    """fp32 unit rows; None when no loss needs texts."""
    pictures_BE: Tensor | None
    """fp32 unit rows: the teacher's embeddings of the scenes, where they are stored; None with a live teacher."""
    on_person_BN: Tensor | None
    """bool: which patches of the scene show the person; None where masks do not ask."""
    keys: tuple[str, ...]
    sources: tuple[int, ...]
    damaged: tuple[str, ...]
    """One line per sample that was replaced."""
    counts: Counts
    """What reading this micro-batch cost."""
    targets_BC: Tensor | None = None
    """fp32: what each sample should be answered with, where a data set has targets; None in pretraining."""

    def pin_memory(self) -> "MicroBatch":
        """Called by the DataLoader, so that copies to a GPU can run beside the step."""
        return self._with({name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def to(self, device: torch.device) -> "MicroBatch":
        """Asynchronous copy of the tensors to a device."""
        return self._with({n: tensor.to(device, non_blocking=True) for n, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {n: getattr(self, n) for n in (*VIEWS, *SMALL)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _with(self, tensors: dict[str, Tensor]) -> "MicroBatch":
        changed: MicroBatch = replace(self, **tensors)  # type: ignore[arg-type]
        return changed


class PlannedDataset(Dataset[MicroBatch]):
    """`dataset[slots]` reads, decodes and cuts the samples of those slots."""

    def __init__(
        self,
        plan: Plan,
        readers: Sequence[ShardReader],
        vectors: Sequence[CaptionVectors] | None,
        settings: ViewSettings,
        seed: int,
        *,
        stored: Sequence[StoredViews] | None = None,
        strict: bool = False,
        renderer: Renderer = render,
    ) -> None:
        """`vectors` and `stored`, one for each reader, are None where no loss needs texts, or scenes are drawn anew."""
        self.plan, self.readers, self.vectors, self.stored = plan, readers, vectors, stored
        self.settings, self.seed, self.strict, self.renderer = settings, seed, strict, renderer
        self.at: Tensor | None = None
        """Shared with the training process: for each loader process the slot it works on, and since when (ns)."""

    @property
    def views(self) -> int:
        """Views of one sample."""
        return 2 if self.settings.with_person else 1

    def __getitem__(self, slots: Sequence[int]) -> MicroBatch:
        return self.make(slots, empty_views(self.views * len(slots), self.settings.image_size))

    def make(self, slots: Sequence[int], room: Tensor) -> MicroBatch:
        """The micro-batch of some slots; its scenes, and behind them its persons, lie in `room`."""
        worker = get_worker_info()
        B = len(slots)
        scene_B3HW = room[:B]
        person_B3HW = room[B : 2 * B] if self.settings.with_person else None
        before = [replace(reader.origin.counts) for reader in self.readers]
        found: list[_Found] = []
        damaged: list[str] = []
        for i, slot in enumerate(slots):
            if worker is not None:
                self._tell(worker.id, slot)
            found.append(
                self._sample(slot, scene_B3HW[i], None if person_B3HW is None else person_B3HW[i], damaged)
            )
        if worker is not None:
            self._tell(worker.id, -1)
        return MicroBatch(
            slots_B=torch.tensor(list(slots), dtype=torch.int64),
            scene_B3HW=scene_B3HW,
            person_B3HW=person_B3HW,
            texts_BE=_stacked([one.text_E for one in found]),
            pictures_BE=_stacked([one.picture_E for one in found]),
            on_person_BN=torch.tensor([one.on_person for one in found])
            if self.settings.person_grid
            else None,
            keys=tuple(one.key for one in found),
            sources=tuple(one.source for one in found),
            damaged=tuple(damaged),
            counts=sum((r.origin.counts - b for r, b in zip(self.readers, before)), Counts()),
            targets_BC=_stacked([one.target_C for one in found]),
        )

    def name(self, slot: int) -> str:
        """What lies at a slot, in words that help to find it."""
        place = self.plan.place(slot)
        reader = self.readers[place.source]
        return f"slot {slot}: {reader.url}/{reader.manifest.shards[place.shard].name}, row {place.row}"

    def close(self) -> None:
        """Closes the files that this process has open."""
        for reader in self.readers:
            reader.close()

    def _tell(self, worker: int, slot: int) -> None:
        if self.at is not None:
            self.at[worker, 0], self.at[worker, 1] = slot, time.monotonic_ns()

    def _sample(
        self, slot: int, scene_3HW: Tensor, person_3HW: Tensor | None, damaged: list[str]
    ) -> "_Found":
        """Fills the views of a slot. A damaged sample is replaced by that of the slot one turn later, and so
        on: a rule that needs no memory and no other rank."""
        for attempt in range(REPLACEMENTS):
            place = self.plan.place(slot + attempt * self.plan.streams)
            reader = self.readers[place.source]
            try:
                raw = reader.read(place.shard, place.row)
                try:
                    plan, picture = self._view_plan(raw, place, slot)
                    self.renderer(raw.image, (raw.width, raw.height), plan, scene_3HW, person_3HW)
                except ValueError as error:
                    name = reader.manifest.shards[place.shard].name
                    raise DamagedSample(f"{name}: {raw.key}: {error}") from None
            except DamagedSample as error:
                damaged.append(f"slot {slot}: {error}")
                if self.strict:
                    raise Fault(f"data.strict: a damaged sample: {damaged[-1]}") from None
                continue
            text = None
            if self.vectors is not None:
                caption = choice(max(1, len(raw.captions)), self.seed, slot, Purpose.CAPTION)
                text = self.vectors[place.source].vector(place.shard, place.row, caption)
            target = None
            if isinstance(reader, LabelledReader):
                target = torch.from_numpy(reader.target(place.shard, place.row))
            return _Found(raw.key, place.source, text, picture, self._on_person(raw, plan, slot), target)
        raise Fault("too many damaged samples in a row: " + "; ".join(damaged[-REPLACEMENTS:]))

    def _view_plan(self, raw: RawSample, place: Place, slot: int) -> tuple[ViewPlan, Tensor | None]:
        """Where the views of a slot lie, and the teacher's embedding of the scene where it is a stored one."""
        size, settings = (raw.width, raw.height), self.settings
        if self.stored is None:
            return training_plan(*size, raw.persons, settings, self.seed, slot), None
        stored = self.stored[place.source]
        number = which_view(stored.count, self.seed, raw.image_sha256, place.epoch)
        view = stored.view(place.shard, place.row, number)
        return with_stored_scene(view.plan, *size, raw.persons, settings, self.seed, slot), view.picture_E

    def _on_person(self, raw: RawSample, plan: ViewPlan, slot: int) -> list[bool]:
        person = choose_person(raw.persons, self.settings.person, self.seed, slot)
        return on_person(plan.scene, person, raw.width, raw.height, self.settings.person_grid)


@dataclass(frozen=True)
class _Found:
    """What a slot holds besides its views."""

    key: str
    source: int
    text_E: Tensor | None
    picture_E: Tensor | None
    on_person: list[bool]
    target_C: Tensor | None


def _stacked(rows: list[Tensor | None]) -> Tensor | None:
    """fp32 rows, or None where there are none."""
    there = [row for row in rows if row is not None]
    return torch.stack(there).float() if there else None


def view_settings(config: Config, *, with_person: bool = True) -> ViewSettings:
    """The settings of the views that a configuration asks for."""
    data = config.data
    return ViewSettings(
        image_size=config.model.image_size,
        scene_scale=data.scene_scale,
        flip=data.flip,
        person=data.person,
        person_margin=data.person_margin,
        background=data.background,
        colour_jitter=data.colour_jitter,
        with_person=with_person,
        person_grid=config.model.image_size // config.model.patch_size
        if config.model.mask == "person"
        else 0,
    )
