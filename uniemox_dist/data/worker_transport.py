"""How micro-batches come from a loader process to the training process: views in shared buffers, the rest by value."""

from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.data.buffers import NONE, ViewBuffers
from uniemox_dist.data.loader import SMALL, VIEWS, MicroBatch, PlannedDataset
from uniemox_dist.data.views import empty_views


@dataclass(frozen=True)
class Failure:
    """An error that says all there is to say; as an exception it would arrive wrapped in a process's traceback."""

    user: bool
    text: str


@dataclass(frozen=True)
class Sent:
    """A micro-batch on its way from a loader process: its views lie in a shared buffer, all else is small."""

    pool: int
    """Which StepBatches of the training process lent the buffer."""
    number: int
    """Of the buffer; or NONE, and then the views come along."""
    views: Tensor | None
    batch: MicroBatch
    """Without tensors."""
    small: dict[str, np.ndarray]
    """Its other tensors by name."""

    @classmethod
    def of(cls, batch: MicroBatch, pool: int, number: int, room: Tensor) -> "Sent":
        """What a loader process sends."""
        bare: MicroBatch = replace(batch, **dict.fromkeys((*VIEWS, *SMALL)))  # type: ignore[arg-type]
        small = {name: tensor.numpy() for name in SMALL if (tensor := getattr(batch, name)) is not None}
        return cls(pool, number, room if number == NONE else None, bare, small)

    def received(self) -> MicroBatch:
        """The micro-batch, in the training process. Its buffer is free again when its views are gone."""
        views = self.views
        if views is None:
            views = LENDERS[self.pool].lend(self.number)
        B = len(self.small["slots_B"])
        small = {name: torch.from_numpy(array) for name, array in self.small.items()}
        person_B3HW = views[B:] if len(views) > B else None
        return replace(self.batch, scene_B3HW=views[:B], person_B3HW=person_B3HW, **small)  # type: ignore[arg-type]

    def pin_memory(self) -> MicroBatch:
        """Called by the DataLoader's thread in the training process."""
        return self.received().pin_memory()


LENDERS: "WeakValueDictionary[int, ViewBuffers]" = WeakValueDictionary()
"""The buffers of this process by their `id`."""


class LoadedDataset(Dataset[Sent | Failure]):
    """The data set in a loader process: views into shared buffers, errors with a message of their own as items."""

    def __init__(self, dataset: PlannedDataset, buffers: ViewBuffers | None) -> None:
        self.dataset, self.buffers, self.pool = dataset, buffers, id(buffers)

    def __getitem__(self, task: tuple[list[int], int]) -> Sent | Failure:
        slots, number = task
        try:
            if self.buffers is None or number == NONE:
                room = empty_views(self.dataset.views * len(slots), self.dataset.settings.image_size)
            else:
                room = self.buffers.room(number)
            return Sent.of(self.dataset.make(slots, room), self.pool, number, room)
        except (UserError, Fault) as error:
            return Failure(isinstance(error, UserError), str(error))
