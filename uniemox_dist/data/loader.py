"""Micro-batches by plan: the sources of a run, and a map-style data set whose item is one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shards.manifest import combined_identity
from uniemox_dist.config.schema import Config
from uniemox_dist.data.draws import Purpose, choice
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.reader import DamagedSample, RawSample, ShardReader
from uniemox_dist.data.views import ViewSettings, training_views

REPLACEMENTS = 8
"""Damaged samples in a row, on one stream, after which the data set is taken to be unusable."""


class CaptionVectors(Protocol):
    """Text embeddings of a data set's captions, by place."""

    def vector(self, shard: int, row: int, caption: int) -> Tensor:
        """The unit row (E) of one caption; caption 0 of a row without captions is the empty text."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, in slot order. Shapes: B samples, E teacher embedding width."""

    slots_B: Tensor
    """int64."""
    scene_B3HW: Tensor
    """uint8."""
    person_B3HW: Tensor | None
    """uint8; None without a person branch."""
    texts_BE: Tensor | None
    """fp32 unit rows; None when no loss needs texts."""
    keys: tuple[str, ...]
    sources: tuple[int, ...]
    damaged: tuple[str, ...]
    """One line per sample that was replaced."""

    def pin_memory(self) -> "MicroBatch":
        """Called by the DataLoader, so that copies to a GPU can run beside the step."""
        tensors = {n: getattr(self, n) for n in ("slots_B", "scene_B3HW", "person_B3HW", "texts_BE")}
        return replace(self, **{n: t.pin_memory() for n, t in tensors.items() if t is not None})

    def to(self, device: torch.device) -> "MicroBatch":
        """Asynchronous copy of the tensors to a device."""
        tensors = {n: getattr(self, n) for n in ("slots_B", "scene_B3HW", "person_B3HW", "texts_BE")}
        moved = {n: t.to(device, non_blocking=True) for n, t in tensors.items() if t is not None}
        return replace(self, **moved)


class Sources:
    """The data sets of a run, and what the plan needs to know of them."""

    def __init__(self, config: Config) -> None:
        """Opens every source of the mix.

        Raises:
            UserError: naming the folder that is missing, empty or damaged.
        """
        origins = config.data.origins()
        fields = (
            ["data.path"] if config.data.path else [f"data.sources.{i}.path" for i in range(len(origins))]
        )
        self.readers = [
            ShardReader.from_folder(origin.path, field, verify_hash=config.data.verify_hash)
            for origin, field in zip(origins, fields)
        ]
        self.weights = [origin.weight for origin in origins]

    @property
    def samples(self) -> int:
        """Samples of all sources."""
        return sum(reader.manifest.samples for reader in self.readers)

    @property
    def identity(self) -> str:
        """The identity of the data, recorded by checkpoints."""
        return combined_identity([reader.manifest.identity for reader in self.readers])

    def plan(self, config: Config) -> Plan:
        """The order of samples of a run over these sources."""
        return Plan(
            [[shard.samples for shard in reader.manifest.shards] for reader in self.readers],
            self.weights,
            streams=config.batch.streams,
            global_batch=config.batch.global_batch,
            seed=config.run.seed,
            window=config.data.shuffle_window,
        )


class PlannedDataset(Dataset[MicroBatch]):
    """`dataset[slots]` reads, decodes and cuts the samples of those slots."""

    def __init__(
        self,
        plan: Plan,
        readers: Sequence[ShardReader],
        vectors: Sequence[CaptionVectors] | None,
        settings: ViewSettings,
        seed: int,
    ) -> None:
        self.plan, self.readers, self.vectors = plan, readers, vectors
        self.settings, self.seed = settings, seed

    def __getitem__(self, slots: Sequence[int]) -> MicroBatch:
        shape = (len(slots), 3, self.settings.image_size, self.settings.image_size)
        scene_B3HW = torch.empty(shape, dtype=torch.uint8)
        person_B3HW = torch.empty(shape, dtype=torch.uint8) if self.settings.with_person else None
        texts: list[Tensor] = []
        keys: list[str] = []
        sources: list[int] = []
        damaged: list[str] = []
        for i, slot in enumerate(slots):
            raw, source, text = self._sample(
                slot, scene_B3HW[i], None if person_B3HW is None else person_B3HW[i], damaged
            )
            keys.append(raw.key)
            sources.append(source)
            if text is not None:
                texts.append(text)
        return MicroBatch(
            slots_B=torch.tensor(list(slots), dtype=torch.int64),
            scene_B3HW=scene_B3HW,
            person_B3HW=person_B3HW,
            texts_BE=torch.stack(texts).float() if texts else None,
            keys=tuple(keys),
            sources=tuple(sources),
            damaged=tuple(damaged),
        )

    def _sample(
        self, slot: int, scene_3HW: Tensor, person_3HW: Tensor | None, damaged: list[str]
    ) -> tuple[RawSample, int, Tensor | None]:
        """Fills the views of a slot. A damaged sample is replaced by that of the slot one turn later, and so
        on: a rule that needs no memory and no other rank."""
        for attempt in range(REPLACEMENTS):
            place = self.plan.place(slot + attempt * self.plan.streams)
            try:
                raw = self.readers[place.source].read(place.shard, place.row)
            except DamagedSample as error:
                damaged.append(f"slot {slot}: {error}")
                continue
            try:
                scene, person = training_views(raw.image, raw.persons, self.settings, self.seed, slot)
            except ValueError as error:
                name = self.readers[place.source].manifest.shards[place.shard].name
                damaged.append(f"slot {slot}: {name}: {raw.key}: {error}")
                continue
            scene_3HW.copy_(scene)
            if person_3HW is not None:
                assert person is not None
                person_3HW.copy_(person)
            text = None
            if self.vectors is not None:
                caption = choice(max(1, len(raw.captions)), self.seed, slot, Purpose.CAPTION)
                text = self.vectors[place.source].vector(place.shard, place.row, caption)
            return raw, place.source, text
        raise RuntimeError("too many damaged samples in a row: " + "; ".join(damaged[-REPLACEMENTS:]))


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
        with_person=with_person,
    )
